"""The divergence from logits, a tile of rows at a time, with a closed-form gradient.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.rows import RowComparison, RowStatistics, tile_rows, tiles


def dense_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    objective: Objective,
    labels_N: Tensor | None = None,
    vocab_chunk: int | None = None,
) -> TokenDivergence:
    """Compare two sets of logits [N, V] token by token.

    The arguments are those of `loss.token_divergence`, which checks them. No tensor of N×V elements is made but
    the gradient of the student's logits, in their dtype.
    """
    N, V = student_logits_NV.shape
    tile = tile_rows(student_logits_NV) if vocab_chunk is None else max(1, vocab_chunk * N // V)
    outputs = _DenseDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, teacher_logits_NV.detach(), labels_N, RowComparison(objective), tile
    )
    return TokenDivergence(*outputs)


class _DenseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: Tensor,
        teacher_logits_NV: Tensor,
        labels_N: Tensor | None,
        compare: RowComparison,
        tile: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.compare, ctx.tile = compare, tile
        ctx.dtype = torch.promote_types(student_logits_NV.dtype, teacher_logits_NV.dtype)
        ctx.dtype = torch.promote_types(ctx.dtype, torch.float32)
        joined = RowStatistics.joined(
            [
                compare(
                    student_logits_NV[rows].to(ctx.dtype),
                    teacher_logits_NV[rows].to(ctx.dtype),
                    None if labels_N is None else labels_N[rows],
                )
                for rows in tiles(student_logits_NV.shape[0], tile)
            ]
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_logits_NV, teacher_logits_NV, labels_N)
        ctx.mark_non_differentiable(*joined[2:])
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        value_weight_N, label_weight_N = upstream[:2]
        student_logits_NV, teacher_logits_NV, labels_N = ctx.saved_tensors
        if value_weight_N is None:
            if label_weight_N is None:
                return None, None, None, None, None
            value_weight_N = torch.zeros_like(label_weight_N)
        gradient_NV = torch.empty_like(student_logits_NV)
        for rows in tiles(student_logits_NV.shape[0], ctx.tile):
            gradient_RV = student_logits_NV[rows].to(ctx.dtype, copy=True)
            ctx.compare(
                gradient_RV,
                teacher_logits_NV[rows].to(ctx.dtype),
                None if labels_N is None else labels_N[rows],
                value_weight_R=value_weight_N[rows],
                label_weight_R=None if label_weight_N is None else label_weight_N[rows],
            )
            gradient_NV[rows] = gradient_RV
        return gradient_NV, None, None, None, None

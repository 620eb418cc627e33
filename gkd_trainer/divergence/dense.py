"""The divergence from logits, a tile of rows at a time, with a closed-form gradient.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return compare_logits(
        RowComparison(objective), student_logits_NV, (teacher_logits_NV,), labels_N=labels_N, tile=tile
    )


def compare_logits(
    compare: Callable[..., RowStatistics],
    student_logits_NV: Tensor,
    teacher: tuple[Tensor, ...],
    *,
    labels_N: Tensor | None,
    tile: int,
) -> TokenDivergence:
    """Return what `compare`, a `RowComparison` or one with its manners, gives of `tile` tokens at a time, joined.

    `teacher` are the tensors that it takes of the teacher, whose first axis is N.
    """
    outputs = _DenseDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, labels_N, compare, tile, *(tensor.detach() for tensor in teacher)
    )
    return TokenDivergence(*outputs)


class _DenseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: Tensor,
        labels_N: Tensor | None,
        compare: Callable[..., RowStatistics],
        tile: int,
        *teacher: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.compare, ctx.tile = compare, tile
        ctx.dtype = torch.float32
        for tensor in (student_logits_NV, *teacher):
            if tensor.is_floating_point():
                ctx.dtype = torch.promote_types(ctx.dtype, tensor.dtype)
        joined = RowStatistics.joined(
            [
                compare(
                    student_logits_NV[rows].to(ctx.dtype),
                    *_converted(teacher, rows, ctx.dtype),
                    None if labels_N is None else labels_N[rows],
                )
                for rows in tiles(student_logits_NV.shape[0], tile)
            ]
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_logits_NV, labels_N, *teacher)
        ctx.mark_non_differentiable(*(field for field in joined[2:] if field is not None))
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        value_weight_N, label_weight_N = upstream[:2]
        student_logits_NV, labels_N, *teacher = ctx.saved_tensors
        others = (None,) * (3 + len(teacher))
        if value_weight_N is None:
            if label_weight_N is None:
                return None, *others
            value_weight_N = torch.zeros_like(label_weight_N)
        gradient_NV = torch.empty_like(student_logits_NV)
        for rows in tiles(student_logits_NV.shape[0], ctx.tile):
            gradient_RV = student_logits_NV[rows].to(ctx.dtype, copy=True)
            ctx.compare(
                gradient_RV,
                *_converted(teacher, rows, ctx.dtype),
                None if labels_N is None else labels_N[rows],
                value_weight_R=value_weight_N[rows],
                label_weight_R=None if label_weight_N is None else label_weight_N[rows],
            )
            gradient_NV[rows] = gradient_RV
        return gradient_NV, *others


def _converted(teacher: Sequence[Tensor], rows: slice, dtype: torch.dtype) -> list[Tensor]:
    """Return those rows of a teacher's tensors, in `dtype` where they are not ids."""
    return [tensor[rows].to(dtype) if tensor.is_floating_point() else tensor[rows] for tensor in teacher]

"""The divergence from logits, a tile of tokens at a time, with a closed-form gradient.

Shapes: N tokens, V vocabulary, R the tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence, joined
from gkd_trainer.divergence.rows import LogitsComparison, RowComparison, tile_size, tiles


def dense_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    objective: Objective,
    labels_N: Tensor | None = None,
    vocab_chunk: int | None = None,
) -> TokenDivergence:
    """Compare two sets of logits [N, V] token by token.

    The arguments are those of `loss.token_divergence`, which checks them. The only tensor of N×V elements allocated is
    the gradient of the student's logits, in their dtype.
    """
    N, V = student_logits_NV.shape
    largest = tile_size(student_logits_NV) if vocab_chunk is None else max(1, vocab_chunk * N // V)
    return compare_logits(
        LogitsComparison(objective), student_logits_NV, (teacher_logits_NV,), labels_N=labels_N, largest=largest
    )


def compare_logits(
    compare: RowComparison,
    student_logits_NV: Tensor,
    teacher: tuple[Tensor, ...],
    *,
    labels_N: Tensor | None,
    largest: int,
) -> TokenDivergence:
    """Return the result of `compare` for all tokens, calling it for at most `largest` at a time.

    `teacher` holds the teacher's tensors that it takes, with N as their first axis.
    """
    result: TokenDivergence
    values_N, cross_entropy_N, result = _DenseDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, labels_N, compare, largest, *(tensor.detach() for tensor in teacher)
    )
    return replace(result, values_N=values_N, cross_entropy_N=cross_entropy_N)


class _DenseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: Tensor,
        labels_N: Tensor | None,
        compare: RowComparison,
        largest: int,
        *teacher: Tensor,
    ) -> tuple[Tensor, Tensor | None, TokenDivergence]:
        """Return the fields that have a gradient, then the result with all fields, which autograd ignores."""
        ctx.compare, ctx.largest = compare, largest
        ctx.dtype = torch.float32
        for tensor in (student_logits_NV, *teacher):
            if tensor.is_floating_point():
                ctx.dtype = torch.promote_types(ctx.dtype, tensor.dtype)
        result = joined(
            [
                compare(
                    student_logits_NV[tile].to(ctx.dtype),
                    _tile_of(teacher, tile, ctx.dtype),
                    None if labels_N is None else labels_N[tile],
                )
                for tile in tiles(student_logits_NV.shape[0], largest)
            ]
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_logits_NV, labels_N, *teacher)
        return result.values_N, result.cross_entropy_N, result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        value_weight_N, label_weight_N, _ = upstream
        student_logits_NV, labels_N, *teacher = ctx.saved_tensors
        others = (None,) * (3 + len(teacher))
        if value_weight_N is None:
            if label_weight_N is None:
                return None, *others
            value_weight_N = torch.zeros_like(label_weight_N)
        gradient_NV = torch.empty_like(student_logits_NV)
        for tile in tiles(student_logits_NV.shape[0], ctx.largest):
            gradient_RV = student_logits_NV[tile].to(ctx.dtype, copy=True)
            ctx.compare(
                gradient_RV,
                _tile_of(teacher, tile, ctx.dtype),
                None if labels_N is None else labels_N[tile],
                value_weight_R=value_weight_N[tile],
                label_weight_R=None if label_weight_N is None else label_weight_N[tile],
            )
            gradient_NV[tile] = gradient_RV
        return gradient_NV, *others


def _tile_of(teacher: Sequence[Tensor], tile: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return a tile of a teacher's tensors, in `dtype` unless they are ids."""
    return tuple(tensor[tile].to(dtype) if tensor.is_floating_point() else tensor[tile] for tensor in teacher)

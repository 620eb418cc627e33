"""The products between hidden states, a head and its logits, with float32 logits for any dtype of the weights.

Shapes: V vocabulary, H hidden width, B a block of tokens, C a tile of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gkd_trainer.types import Head, HiddenSignal

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes that products may take their inputs in."""

_FLOAT16_GAIN = 2.0**12
"""By what a gradient is raised before it becomes float16, whose smallest number is 6e-8."""


@dataclass
class HeadGradient:
    """What the blocks of a student's gradient add up to; None where none is wanted."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, student: HiddenSignal, needs: tuple[bool, bool, bool], dtype: torch.dtype) -> HeadGradient:
        """Return zeros in `dtype` for what `needs` a gradient of hidden states, weight and bias."""
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            torch.zeros_like(tensor, dtype=dtype) if need and tensor is not None else None
            for need, tensor in zip(needs, (student.hidden_NH, head.weight_VH, head.bias_V), strict=True)
        )
        return cls(hidden_NH, weight_VH, bias_V)

    def cut(self, V: int) -> HeadGradient:
        """Return what is of the first V tokens, sharing memory with this one."""
        weight_VH, bias_V = (None if gradient is None else gradient[:V] for gradient in (self.weight_VH, self.bias_V))
        return HeadGradient(self.hidden_NH, weight_VH, bias_V)

    def scaled(self, factor: Tensor, student: HiddenSignal) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients times a factor, each in the dtype of what it is of; they are overwritten."""
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            None if gradient is None or of is None else gradient.mul_(factor).to(of.dtype)
            for gradient, of in (
                (self.hidden_NH, student.hidden_NH),
                (self.weight_VH, head.weight_VH),
                (self.bias_V, head.bias_V),
            )
        )
        return hidden_NH, weight_VH, bias_V


@dataclass(frozen=True)
class Projection:
    """A head's products, whose sums are of `dtype` (float32 or float64).

    Products that round their inputs to `half` (None for none) are all of them on CUDA, where a weight of another
    dtype is copied once; elsewhere those of the gradient alone, since torch 2.13 can't sum the logits in float32
    there. `tile` is how many rows of the weight are converted at once where the whole is not.
    """

    head: Head
    dtype: torch.dtype
    tile: int
    half: torch.dtype | None = None

    def logits(self, hidden_BH: Tensor, out_BV: Tensor) -> None:
        """Write the logits of hidden states into `out_BV`, which is of `dtype`."""
        head = self.head
        if self.half is not None and head.weight_VH.is_cuda:
            torch.mm(hidden_BH.to(self.half), self._half_weight_VH.T, out_dtype=self.dtype, out=out_BV)
        else:
            hidden_BH = hidden_BH.to(self.dtype)
            for columns, weight_CH in self._weight_tiles(self.dtype):
                torch.mm(hidden_BH, weight_CH.T, out=out_BV[:, columns])
        if head.bias_V is not None:
            out_BV += head.bias_V
        if head.scale != 1:
            out_BV *= head.scale
        if head.softcap is not None:
            out_BV.div_(head.softcap).tanh_().mul_(head.softcap)

    def add_gradient(
        self, slope_BV: Tensor, scratch_BV: Tensor, hidden_BH: Tensor, rows: slice, gradient: HeadGradient
    ) -> None:
        """Add a block's part to the gradients of hidden states, weight and bias.

        `slope_BV` is with respect to the logits before the soft-cap; it and `scratch_BV` may be overwritten.
        """
        scale = self.head.scale
        if gradient.bias_V is not None:
            gradient.bias_V.add_(slope_BV.sum(dim=0), alpha=scale)
        # A row that is not finite has a slope of zero, but 0·NaN is NaN.
        hidden_BH = torch.where(hidden_BH.isfinite(), hidden_BH, 0.0)
        if self.half is not None:
            half_BV = scratch_BV.view(self.half)[:, : slope_BV.shape[1]]
            self._add_half_gradient(slope_BV, half_BV, hidden_BH.to(self.half), rows, gradient)
            return
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_tiles(self.dtype):
                gradient.hidden_NH[rows].addmm_(slope_BV[:, columns], weight_CH, alpha=scale)
        if gradient.weight_VH is not None:
            gradient.weight_VH.addmm_(slope_BV.T, hidden_BH.to(self.dtype), alpha=scale)

    def _add_half_gradient(
        self, slope_BV: Tensor, half_BV: Tensor, half_BH: Tensor, rows: slice, gradient: HeadGradient
    ) -> None:
        gain = _FLOAT16_GAIN if half_BV.dtype == torch.float16 else 1.0
        scale = self.head.scale / gain
        half_BV.copy_(slope_BV if gain == 1 else slope_BV.mul_(gain))
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_tiles(half_BV.dtype):
                gradient.hidden_NH[rows].add_(self._product(half_BV[:, columns], weight_CH), alpha=scale)
        if gradient.weight_VH is not None:
            # Tile by tile: the whole product would be another gradient of the weight in size.
            for columns in self._columns:
                gradient.weight_VH[columns].add_(self._product(half_BV[:, columns].T, half_BH), alpha=scale)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return a product of halves: in `dtype` on CUDA, elsewhere summed in float32 and rounded once."""
        return torch.mm(left, right, out_dtype=self.dtype) if left.is_cuda else torch.mm(left, right)

    @cached_property
    def _half_weight_VH(self) -> Tensor:
        assert self.half is not None
        return self.head.weight_VH.to(self.half)

    def _weight_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        weight_VH = self.head.weight_VH
        if weight_VH.dtype == dtype:
            yield slice(None), weight_VH
        elif dtype == self.half and weight_VH.is_cuda:
            yield slice(None), self._half_weight_VH
        else:
            for columns in self._columns:
                yield columns, weight_VH[columns].to(dtype)

    @cached_property
    def _columns(self) -> list[slice]:
        V = self.head.weight_VH.shape[0]
        return [slice(start, min(start + self.tile, V)) for start in range(0, V, self.tile)]

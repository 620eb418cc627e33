"""The products between hidden states, a head and its logits, in float32 for any dtype of the weights.

Shapes: V vocabulary, H hidden width, B a block of tokens, C a tile of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gkd_trainer.batch import Head, HiddenSignal

_HALVES = (torch.bfloat16, torch.float16)

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
    """A head's products in `dtype` (float32 or float64), none of which copies the whole weight.

    `tile` is how many rows of the weight are converted at once where its dtype is another.
    """

    head: Head
    dtype: torch.dtype
    tile: int

    def logits(self, hidden_BH: Tensor, out_BV: Tensor) -> None:
        """Write the logits of hidden states into `out_BV`, which is of `dtype`."""
        head = self.head
        if self._multiplies_halves(hidden_BH):
            torch.mm(hidden_BH, head.weight_VH.T, out_dtype=self.dtype, out=out_BV)
        else:
            hidden_BH = hidden_BH.to(self.dtype)
            for columns, weight_CH in self._weight_tiles:
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

        `slope_BV` is with respect to the logits before the soft-cap; `scratch_BV` is overwritten. With half
        weights on CUDA, both products take the slope in half precision and add up in float32.
        """
        scale = self.head.scale
        if gradient.bias_V is not None:
            gradient.bias_V.add_(slope_BV.sum(dim=0), alpha=scale)
        # A row that is not finite has a slope of zero, but 0·NaN is NaN.
        hidden_BH = torch.where(hidden_BH.isfinite(), hidden_BH, 0.0)
        if self._multiplies_halves(hidden_BH):
            self._add_half_gradient(slope_BV, scratch_BV, hidden_BH, rows, gradient)
            return
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_tiles:
                gradient.hidden_NH[rows].addmm_(slope_BV[:, columns], weight_CH, alpha=scale)
        if gradient.weight_VH is not None:
            gradient.weight_VH.addmm_(slope_BV.T, hidden_BH.to(self.dtype), alpha=scale)

    def _add_half_gradient(
        self, slope_BV: Tensor, scratch_BV: Tensor, hidden_BH: Tensor, rows: slice, gradient: HeadGradient
    ) -> None:
        weight_VH = self.head.weight_VH
        gain = _FLOAT16_GAIN if weight_VH.dtype == torch.float16 else 1.0
        scale = self.head.scale / gain
        half_BV = scratch_BV.view(weight_VH.dtype)[:, : weight_VH.shape[0]]
        half_BV.copy_(slope_BV if gain == 1 else slope_BV.mul_(gain))
        if gradient.hidden_NH is not None:
            product_BH = torch.mm(half_BV, weight_VH, out_dtype=self.dtype)
            gradient.hidden_NH[rows].add_(product_BH, alpha=scale)
        if gradient.weight_VH is not None:
            # Tile by tile: the whole product would be another gradient of the weight in size.
            for columns in self._columns:
                product_CH = torch.mm(half_BV[:, columns].T, hidden_BH, out_dtype=self.dtype)
                gradient.weight_VH[columns].add_(product_CH, alpha=scale)

    def _multiplies_halves(self, hidden_BH: Tensor) -> bool:
        # Such products give float32 on CUDA alone (torch 2.13).
        weight_VH = self.head.weight_VH
        is_half = weight_VH.dtype in _HALVES and hidden_BH.dtype == weight_VH.dtype
        return is_half and weight_VH.is_cuda and self.dtype == torch.float32

    @property
    def _weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        weight_VH = self.head.weight_VH
        if weight_VH.dtype == self.dtype:
            yield slice(None), weight_VH
            return
        for columns in self._columns:
            yield columns, weight_VH[columns].to(self.dtype)

    @cached_property
    def _columns(self) -> list[slice]:
        V = self.head.weight_VH.shape[0]
        return [slice(start, min(start + self.tile, V)) for start in range(0, V, self.tile)]

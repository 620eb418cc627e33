"""The products of hidden states, a head and its logits; logits are float32 whatever the dtype of the weights.

Shapes: V vocabulary, H hidden width, R the tokens of a tile, C a chunk of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gkd_trainer.signals import Head, HiddenSignal

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes to which products may round their inputs."""

_FLOAT16_GAIN = 2.0**12
"""The factor by which a gradient is scaled before rounding to float16, whose smallest number is 6e-8."""


@dataclass
class HeadGradient:
    """The gradients of a student, to which each tile adds its part; None for tensors that need none."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, student: HiddenSignal, needs: tuple[bool, bool, bool], dtype: torch.dtype) -> HeadGradient:
        """Return zeros in `dtype` for each of hidden states, weight and bias that `needs` a gradient."""
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            torch.zeros_like(tensor, dtype=dtype) if need and tensor is not None else None
            for need, tensor in zip(needs, (student.hidden_NH, head.weight_VH, head.bias_V), strict=True)
        )
        return cls(hidden_NH, weight_VH, bias_V)

    def cut(self, V: int) -> HeadGradient:
        """Return the gradients of the first V tokens of the vocabulary, sharing memory with this one."""
        weight_VH, bias_V = (None if gradient is None else gradient[:V] for gradient in (self.weight_VH, self.bias_V))
        return HeadGradient(self.hidden_NH, weight_VH, bias_V)

    def scaled(self, factor: Tensor, student: HiddenSignal) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients times a factor, each in the dtype of its tensor; they are overwritten."""
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            None if gradient is None or tensor is None else gradient.mul_(factor).to(tensor.dtype)
            for gradient, tensor in (
                (self.hidden_NH, student.hidden_NH),
                (self.weight_VH, head.weight_VH),
                (self.bias_V, head.bias_V),
            )
        )
        return hidden_NH, weight_VH, bias_V


@dataclass(frozen=True)
class Projection:
    """A head's products, summed in `dtype` (float32 or float64).

    On CUDA, all of them round their inputs to `half` (None rounds nothing), and a weight of another dtype is copied
    once. Elsewhere only the products of the gradient do, since torch 2.13 can't sum the logits in float32 there.
    `chunk` is the number of vocabulary entries whose weights are converted at once, if not all are.
    """

    head: Head
    dtype: torch.dtype
    chunk: int
    half: torch.dtype | None = None

    def logits(self, hidden_RH: Tensor, out_RV: Tensor) -> None:
        """Write the logits of hidden states into `out_RV`, which has the dtype `dtype`."""
        head = self.head
        if self.half is not None and head.weight_VH.is_cuda:
            torch.mm(hidden_RH.to(self.half), self._half_weight_VH.T, out_dtype=self.dtype, out=out_RV)
        else:
            hidden_RH = hidden_RH.to(self.dtype)
            for columns, weight_CH in self._weight_chunks(self.dtype):
                torch.mm(hidden_RH, weight_CH.T, out=out_RV[:, columns])
        if head.bias_V is not None:
            out_RV += head.bias_V
        if head.scale != 1:
            out_RV *= head.scale
        if head.softcap is not None:
            out_RV.div_(head.softcap).tanh_().mul_(head.softcap)

    def add_gradient(
        self, slope_RV: Tensor, scratch_RV: Tensor, hidden_RH: Tensor, tile: slice, gradient: HeadGradient
    ) -> None:
        """Add a tile's part to the gradients of hidden states, weight and bias.

        `slope_RV` is the gradient of the logits before the soft-cap; it and `scratch_RV` may be overwritten.
        """
        scale = self.head.scale
        if gradient.bias_V is not None:
            gradient.bias_V.add_(slope_RV.sum(dim=0), alpha=scale)
        # A row that is not finite has a slope of zero, but 0·NaN is NaN.
        hidden_RH = torch.where(hidden_RH.isfinite(), hidden_RH, 0.0)
        if self.half is not None:
            half_RV = scratch_RV.view(self.half)[:, : slope_RV.shape[1]]
            self._add_half_gradient(slope_RV, half_RV, hidden_RH.to(self.half), tile, gradient)
            return
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_chunks(self.dtype):
                gradient.hidden_NH[tile].addmm_(slope_RV[:, columns], weight_CH, alpha=scale)
        if gradient.weight_VH is not None:
            gradient.weight_VH.addmm_(slope_RV.T, hidden_RH.to(self.dtype), alpha=scale)

    def _add_half_gradient(
        self, slope_RV: Tensor, half_RV: Tensor, half_RH: Tensor, tile: slice, gradient: HeadGradient
    ) -> None:
        gain = _FLOAT16_GAIN if half_RV.dtype == torch.float16 else 1.0
        scale = self.head.scale / gain
        half_RV.copy_(slope_RV if gain == 1 else slope_RV.mul_(gain))
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_chunks(half_RV.dtype):
                gradient.hidden_NH[tile].add_(self._product(half_RV[:, columns], weight_CH), alpha=scale)
        if gradient.weight_VH is not None:
            # Chunk by chunk: the full product would be as large as the gradient of the weight.
            for columns in self._columns:
                gradient.weight_VH[columns].add_(self._product(half_RV[:, columns].T, half_RH), alpha=scale)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return a product of halves: in `dtype` on CUDA, elsewhere summed in float32 and rounded once."""
        return torch.mm(left, right, out_dtype=self.dtype) if left.is_cuda else torch.mm(left, right)

    @cached_property
    def _half_weight_VH(self) -> Tensor:
        assert self.half is not None
        return self.head.weight_VH.to(self.half)

    def _weight_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
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
        return [slice(start, min(start + self.chunk, V)) for start in range(0, V, self.chunk)]

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

FLOAT16_LIMIT = torch.finfo(torch.float16).max
"""A larger slope is cut to it: an infinity would end in NaN, whatever the scale of the loss."""

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes to which products may round their inputs."""


@dataclass
class HeadGradient:
    """The gradients of a student, to which each tile adds its part; None for tensors that need none."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(
        cls, student: HiddenSignal, needs: tuple[bool, bool, bool], dtype: torch.dtype, half: torch.dtype | None = None
    ) -> HeadGradient:
        """Return zeros in `dtype` for each of hidden states, weight and bias that `needs` a gradient.

        With the `half` of the student's `Projection`, the weight's may not be filled yet: the first tile overwrites it.
        """
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            torch.empty_like(tensor, dtype=dtype) if need and tensor is not None else None
            for need, tensor in zip(needs, (student.hidden_NH, head.weight_VH, head.bias_V), strict=True)
        )
        first = student.vocab_size if _sums_halves(head, half) else 0
        of_weight = None if weight_VH is None else weight_VH[first:]
        for gradient in (hidden_NH, of_weight, bias_V):
            if gradient is not None:
                gradient.zero_()
        return cls(hidden_NH, weight_VH, bias_V)

    def cut(self, V: int) -> HeadGradient:
        """Return the gradients of the first V tokens of the vocabulary, sharing memory with this one."""
        weight_VH, bias_V = (None if gradient is None else gradient[:V] for gradient in (self.weight_VH, self.bias_V))
        return HeadGradient(self.hidden_NH, weight_VH, bias_V)

    def scaled(self, factor: Tensor, student: HiddenSignal) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients times a factor, each in the dtype of its tensor; they are overwritten."""
        head = student.head
        hidden_NH, weight_VH, bias_V = (
            None if gradient is None or tensor is None else _scaled(gradient, factor, tensor.dtype)
            for gradient, tensor in (
                (self.hidden_NH, student.hidden_NH),
                (self.weight_VH, head.weight_VH),
                (self.bias_V, head.bias_V),
            )
        )
        return hidden_NH, weight_VH, bias_V


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.is_cuda and gradient.dtype != dtype:
        # Reads and writes once; on a CPU, torch would allocate the product first.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.mul_(factor).to(dtype)


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

    @property
    def gain(self) -> float:
        """The factor of slopes in `add_gradient`, so that float16, whose smallest number is 6e-8, can hold them."""
        return 2.0**12 if self.half == torch.float16 else 1.0

    def logits(self, hidden_RH: Tensor, out_RV: Tensor) -> None:
        """Write the logits of hidden states into `out_RV`, which has the dtype `dtype`."""
        head = self.head
        if _sums_halves(head, self.half):
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
        self, slope_RV: Tensor, scratch: Tensor, hidden_RH: Tensor, tile: slice, gradient: HeadGradient
    ) -> None:
        """Add a tile's part to the gradients of hidden states, weight and bias.

        `slope_RV` is the gradient of the logits before the soft-cap, times `gain`, in `dtype` or `half`. `scratch` has
        as many rows and may be overwritten; with `half`, its rows hold V numbers of that dtype.
        """
        scale = self.head.scale / self.gain
        if gradient.bias_V is not None:
            gradient.bias_V.add_(slope_RV.sum(dim=0, dtype=self.dtype), alpha=scale)
        # A row that is not finite has a slope of zero, but 0·NaN is NaN.
        hidden_RH = torch.where(hidden_RH.isfinite(), hidden_RH, 0.0)
        if self.half is not None:
            if slope_RV.dtype != self.half:
                if self.half == torch.float16:
                    slope_RV = slope_RV.clamp_(-FLOAT16_LIMIT, FLOAT16_LIMIT)
                slope_RV = scratch.view(self.half)[:, : slope_RV.shape[1]].copy_(slope_RV)
            self._add_half_gradient(slope_RV, hidden_RH.to(self.half), tile, gradient, scale)
            return
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_chunks(self.dtype):
                gradient.hidden_NH[tile].addmm_(slope_RV[:, columns], weight_CH, alpha=scale)
        if gradient.weight_VH is not None:
            gradient.weight_VH.addmm_(slope_RV.T, hidden_RH.to(self.dtype), alpha=scale)

    def _add_half_gradient(
        self, slope_RV: Tensor, hidden_RH: Tensor, tile: slice, gradient: HeadGradient, scale: float
    ) -> None:
        if _sums_halves(self.head, self.half):
            if gradient.hidden_NH is not None:
                _add_product(gradient.hidden_NH[tile], slope_RV, self._half_weight_VH, scale)
            if gradient.weight_VH is not None:
                _add_product(gradient.weight_VH, slope_RV.T, hidden_RH, scale, is_first=tile.start == 0)
            return
        if gradient.hidden_NH is not None:
            for columns, weight_CH in self._weight_chunks(slope_RV.dtype):
                gradient.hidden_NH[tile].add_(slope_RV[:, columns] @ weight_CH, alpha=scale)
        if gradient.weight_VH is not None:
            # Chunk by chunk: the full product would be as large as the gradient of the weight.
            for columns in self._columns:
                gradient.weight_VH[columns].add_(slope_RV[:, columns].T @ hidden_RH, alpha=scale)

    @cached_property
    def _half_weight_VH(self) -> Tensor:
        assert self.half is not None
        return self.head.weight_VH.to(self.half)

    def _weight_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        weight_VH = self.head.weight_VH
        if weight_VH.dtype == dtype:
            yield slice(None), weight_VH
        else:
            for columns in self._columns:
                yield columns, weight_VH[columns].to(dtype)

    @cached_property
    def _columns(self) -> list[slice]:
        V = self.head.weight_VH.shape[0]
        return [slice(start, min(start + self.chunk, V)) for start in range(0, V, self.chunk)]


def _sums_halves(head: Head, half: torch.dtype | None) -> bool:
    """Return whether products are of halves and summed in float32, for which torch has kernels on CUDA only."""
    return half is not None and head.weight_VH.is_cuda


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, *, is_first: bool = False) -> None:
    """Add scale·left·right, a product of halves, to a float32 matrix, which the first one overwrites."""
    # One tensor object for input and output: if they were two, torch would first copy one to the other.
    torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if is_first else 1, alpha=scale, out=total)

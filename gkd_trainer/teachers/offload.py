"""Weights of a teacher that wait on the CPU while it is not at work."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from gkd_trainer.signals import GroupedSignal, HiddenSignal, Signal, SummedSignal
from gkd_trainer.teachers.base import Teacher, all_teachers

logger = logging.getLogger(__name__)


class WaitingWeights:
    """The weights of models that wait on the CPU between their turns.

    They never change, so they are copied to the CPU only once, and then only to the device. On CUDA the copies are in
    pinned memory, from which copying is fastest.

    Args:
        weights: The weights, on their device; the originals are released from it.
        device: Where they work.
    """

    def __init__(self, weights: Sequence[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._weights = [(weight, _on_cpu(weight.data, is_pinned=device.type == "cuda")) for weight in weights]
        self._leave()

    @classmethod
    def of(cls, teacher: Teacher, name: str, device: torch.device) -> WaitingWeights | None:
        """Return the waiting weights of all models in a teacher; None if none of them can move.

        That is so on a CPU, for a teacher behind a server, and, with a warning, for a model that is quantised, sharded,
        or placed by a device map. The student's own weights never move.
        """
        if device.type == "cpu":
            return None
        weights: dict[int, nn.Parameter] = {}
        for each in all_teachers(teacher):
            if each.model is None or each.shares_weights:
                continue
            reason = _reason_to_stay(each.model)
            if reason is None:
                weights |= {id(weight): weight for weight in each.model.parameters()}
            else:
                logger.warning("Teacher %s is not offloaded: %s.", name, reason)
        return cls(list(weights.values()), device) if weights else None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the weights on their device during the block."""
        for weight, copy in self._weights:
            weight.data = _on_device(copy, self._device)
        try:
            yield
        finally:
            self._leave()

    def detached(self, signal: Signal) -> Signal:
        """Return a signal that keeps its head on the device for as long as it is used."""
        if isinstance(signal, GroupedSignal):
            return replace(signal, groups=tuple(map(self.detached, signal.groups)))
        if isinstance(signal, SummedSignal):
            return replace(signal, terms=tuple(map(self.detached, signal.terms)))
        if not isinstance(signal, HiddenSignal):
            return signal
        head = signal.head
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        return replace(signal, head=replace(head, weight_VH=head.weight_VH.detach(), bias_V=bias_V))

    def _leave(self) -> None:
        for weight, copy in self._weights:
            weight.data = copy


def _on_cpu(tensor: Tensor, *, is_pinned: bool) -> Tensor:
    copy = tensor.to("cpu")
    return copy.pin_memory() if is_pinned else copy


def _on_device(copy: Tensor, device: torch.device) -> Tensor:
    return copy.to(device, non_blocking=True)


def _reason_to_stay(model: nn.Module) -> str | None:
    if getattr(model, "is_quantized", False):
        return "they are quantised"
    if getattr(model, "hf_device_map", None) is not None:
        return "a device map placed them"
    if any(type(weight) is not nn.Parameter or hasattr(weight, "ds_id") for weight in model.parameters()):
        return "they are sharded, or of a type of their own"
    return None

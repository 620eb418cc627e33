"""Copies between the host and a device that only make the host wait when it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy from the host to CUDA is only queued, behind the work queued before it.

    Such a copy is made from pinned memory, which is not used again before the copy is done. From ordinary memory it
    would first wait for the device.
    """
    if tensor.device.type != "cpu" or device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device)
    # Contiguous, since memory of its own would have the strides of an expanded tensor.
    pinned = tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()
    return pinned.to(device, non_blocking=True)


def all_to_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return values with their tensors on a device; see `to_device`."""
    return {name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in values.items()}


def integers_to_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with their tensors of integers on the CPU, and the rest as it is, such as pixels.

    All copies begin before the first is awaited.
    """
    begun = {
        name: HostCopy(value) if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in values.items()
    }
    return {name: value.read() if isinstance(value, HostCopy) else value for name, value in begun.items()}


class HostCopy:
    """A copy of a tensor on the host, begun now. Reading it waits for what was queued before it, and for no more."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()

"""The batches of a window on their way to the device: the host keeps what it must know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from gkd_trainer.transfer import all_to_device
from gkd_trainer.types import TokenBatch


def keep_on_host(dataloader: Any) -> None:
    """Have a loader of Accelerate leave its batches on the CPU, where a window is prepared.

    Accelerate moves each batch as it is taken, and waits for everything that the device has to do before it.
    """
    if isinstance(dataloader, DataLoaderShard):
        dataloader.device = None


class Placement:
    """Moves the batches of a window to the device, and knows them by their tensors there.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._placed: list[_Placed] = []

    def placed(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the batches of the next window on the device, without waiting for it; earlier ones are forgotten.

        Batches that are there already, from a loader that this trainer did not make, are copied to the host.
        """
        self._placed = []
        found = []
        for batch in batches:
            host = TokenBatch.from_inputs(batch).on_host
            moved = all_to_device(batch, self._device)
            self._placed.append(_Placed(moved, _state(moved), host))
            found.append(moved)
        return found

    @property
    def scored_tokens(self) -> int:
        """How many tokens of the window are trained on."""
        return sum(placed.host.n_scored for placed in self._placed)

    def recognised(self, inputs: Mapping[str, Any], batch: TokenBatch) -> TokenBatch:
        """Return the batch made of `inputs`, with its copy on the host if they are a batch of the window, unchanged."""
        state = _state(inputs)
        for placed in self._placed:
            if placed.state == state:
                return batch.known_on_host(placed.host)
        return batch


class _Placed(NamedTuple):
    """A batch on the device, what it was when it was placed, and its copy on the host."""

    batch: Mapping[str, Any]
    state: dict[str, tuple[int, int]]
    host: TokenBatch


def _state(inputs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return which tensors a batch holds, and how often each was written to.

    Without those of floats, such as pixels, which DeepSpeed casts and the host never reads.
    """
    return {
        name: (id(value), value._version)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and not value.is_floating_point()
    }

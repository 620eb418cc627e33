"""The batches of a window on their way to the device: the host keeps what it must know of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from gkd_trainer.transfer import to_device
from gkd_trainer.types import TokenBatch


@contextmanager
def kept_on_host(batches: Iterator[Any]) -> Iterator[None]:
    """Leave the batches taken from a loader of Accelerate on the CPU, where a window is prepared.

    Accelerate moves each batch as it is taken, and waits for everything that the device has to do before it. For
    others, such as callbacks, the loader stays as it is. It is found by its iterator, since the rest of an epoch that
    is resumed has a loader of its own.
    """
    loader = inspect.getgeneratorlocals(batches).get("self") if inspect.isgenerator(batches) else None
    if not isinstance(loader, DataLoaderShard):
        yield
        return
    device, loader.device = loader.device, None
    try:
        yield
    finally:
        loader.device = device


class Placement:
    """Moves the batches of a window to the device, and knows them by their tensors there.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._placed: list[_Placed] = []

    def placed(self, batches: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
        """Return the batches of the next window on the device, without waiting for it; earlier ones are forgotten.

        Batches that are there already, from a loader that this trainer did not make, are copied to the host.
        """
        self._placed = []
        found = []
        for batch in batches:
            host = TokenBatch.from_inputs(batch).on_host
            moved = copy.copy(batch)  # of the collator's own type, such as BatchEncoding
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    moved[name] = to_device(value, self._device)
            self._placed.append(_Placed(moved, _state(moved), host))
            found.append(moved)
        return found

    @property
    def scored_tokens(self) -> int:
        """How many tokens of the window are trained on."""
        return sum(placed.host.n_scored for placed in self._placed)

    def recognised(self, inputs: Mapping[str, Any], batch: TokenBatch) -> TokenBatch:
        """Return the batch made of `inputs`, with its copy on the host if they are a batch of the window, unchanged."""
        placed = self._found(inputs)
        return batch if placed is None else batch.known_on_host(placed.host)

    def holds(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether `inputs` are a batch of the window, unchanged."""
        return self._found(inputs) is not None

    def _found(self, inputs: Mapping[str, Any]) -> _Placed | None:
        state = _state(inputs) if self._placed else None
        return next((placed for placed in self._placed if state is not None and placed.state == state), None)


class _Placed(NamedTuple):
    """A batch on the device, what it was when it was placed, and its copy on the host."""

    batch: Mapping[str, Any]
    state: dict[str, tuple[int, int]] | None
    host: TokenBatch


def _state(inputs: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    """Return which tensors a batch holds, and how often each was written to; None if torch does not count that.

    Without those of floats, such as pixels, which DeepSpeed casts and the host never reads.
    """
    integers = {
        name: value for name, value in inputs.items() if isinstance(value, Tensor) and not value.is_floating_point()
    }
    if any(value.is_inference() for value in integers.values()):
        return None
    return {name: (id(value), value._version) for name, value in integers.items()}

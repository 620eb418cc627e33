"""Take all micro-batches of an optimizer step from the epoch at once; on all ranks, or on none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.trainer_utils import has_length

from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.trainer.placement import kept_on_host
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)


def require_equal_epochs(loader: Any, ranks: Ranks) -> None:
    """Raise GKDConfigError, on all ranks, if their epochs have different numbers of batches.

    Each would go on to its next epoch by itself, until one is done and the others wait for it.
    """
    if (counts := unequal_counts(loader, ranks)) is not None:
        raise GKDConfigError(
            f"each rank must train on the same number of batches, but they have {', '.join(map(str, counts))}, and "
            "would wait for one another forever: set even_batches to True in accelerator_config, or "
            "dataloader_drop_last=True"
        )


def unequal_counts(loader: Any, ranks: Ranks) -> list[int] | None:
    """Return how many batches each rank has if they differ, as they may without `even_batches`; on all ranks together.

    Returns None for loaders without a length, which can't be compared.
    """
    if ranks.size == 1 or ranks.accelerator.even_batches or not has_length(loader):
        return None
    counts: list[int] = ranks.gather(torch.tensor([len(loader)], device=ranks.accelerator.device)).tolist()
    return counts if min(counts) != max(counts) else None


class WindowLoader:
    """Takes windows from epochs; all ranks end an epoch after the same window."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._ended_epoch: Iterator[Any] | None = None
        self._has_warned = False

    def has_ended(self, epoch: Iterator[Any]) -> bool:
        """Return whether an epoch's last window was taken: Trainer still asks for each step left in the run."""
        return epoch is self._ended_epoch

    def take(
        self, epoch: Iterator[Any], num_batches: int, *, has_length: bool, is_first: bool = False
    ) -> list[dict[str, Any]]:
        """Return the next batches of an epoch; none at its end, which all ranks reach together.

        Streams have no length: ranks could run out of data at different steps, and wait for each other forever. So a
        stream's epoch ends at the first window that any rank can't fill. Trainer takes no optimizer step for a smaller
        window, since it does not know that it is the last.

        Args:
            epoch: The iterator of the epoch's batches.
            num_batches: The number of micro-batches in a full window.
            has_length: Whether the epoch's length is known; then it is the same on all ranks (`require_equal_epochs`).
            is_first: Whether nothing was trained on yet.

        Raises:
            GKDDataError: The first window is missing or incomplete.
        """
        if self.has_ended(epoch):
            return []
        self._ended_epoch = None
        with kept_on_host(epoch):
            batches = list(itertools.islice(epoch, num_batches))
        lacking = 0 if has_length else self._ranks.count(len(batches) < num_batches)
        if is_first and (lacking or not batches):
            raise self._too_few(lacking, num_batches)
        if lacking == 0:
            return batches
        self._ended_epoch = epoch
        if lacking < self._ranks.size and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The ranks' shards of the training stream differ in length: an epoch ends with the shortest, and the "
                "rest of the others is not trained on."
            )
        return []

    def _too_few(self, lacking: int, num_batches: int) -> GKDDataError:
        if lacking:
            return GKDDataError(
                f"the training set is too small for one step: {lacking} of {self._ranks.size} ranks had fewer than "
                f"{num_batches} batches (gradient_accumulation_steps). Add rows, or use fewer ranks or smaller "
                "batches; the log counts the dropped rows by reason"
            )
        return GKDDataError(
            "the training set gave no batch, since none of its rows can be used; the log counts the dropped rows by "
            "reason"
        )


@dataclass(frozen=True)
class Epoch:
    """The current epoch, before its next window.

    `batches` are its remaining batches; `has_length` says whether its length is known. `num_batches` is the number of
    micro-batches in the next window, `accumulation` in later windows; `batch_size` is the configured number of samples
    in a rank's micro-batch. `max_steps` is the length of the run. `is_first` says that nothing was trained on yet.
    `completed` returns a collated batch with what the student's forward needs besides.
    """

    loader: WindowLoader
    batches: Iterator[Any]
    has_length: bool
    num_batches: int
    accumulation: int
    batch_size: int
    max_steps: int
    is_first: bool
    completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch

    def take(self, num_batches: int, *, is_first: bool) -> list[dict[str, Any]]:
        """Return the batches of the next window; see `WindowLoader.take`."""
        batches = self.loader.take(self.batches, num_batches, has_length=self.has_length, is_first=is_first)
        return [self.completed(batch) for batch in batches]

    def later(self) -> Epoch:
        """Return the epoch as it will be before a later window."""
        return replace(self, num_batches=self.accumulation, is_first=False)

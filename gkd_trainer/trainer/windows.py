"""Take all micro-batches of an optimizer step from the epoch at once; on all ranks, or on none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gkd_trainer.errors import GKDDataError
from gkd_trainer.trainer.placement import kept_on_host
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)


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
            has_length: Whether the epoch's length is known: then Trainer makes the ranks agree.
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

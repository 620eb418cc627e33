"""The micro-batches of an optimizer step, taken from the epoch together; on all ranks, or on none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gkd_trainer.errors import GKDDataError
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)


class WindowLoader:
    """Takes windows from epochs; every rank ends an epoch after the same one."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._ended_epoch: Iterator[Any] | None = None
        self._has_warned = False

    def has_ended(self, epoch: Iterator[Any]) -> bool:
        """Return whether the last window of an epoch was taken: Trainer asks again for each step that is left."""
        return epoch is self._ended_epoch

    def take(
        self, epoch: Iterator[Any], num_batches: int, *, has_length: bool, is_first: bool = False
    ) -> list[dict[str, Any]]:
        """Return the next batches of an epoch; none at its end, which comes on all ranks at once.

        Streams have no length, so that ranks may run out of data at different steps, and wait for one another for ever.
        Their epoch ends with the first window that any rank can't fill: Trainer takes no optimizer step for a smaller
        one, since it does not know that it is the last.

        Args:
            epoch: The iterator of the epoch's batches.
            num_batches: How many micro-batches a full window has.
            has_length: Whether the epoch's length is known: then Trainer has seen to it that the ranks agree.
            is_first: Whether nothing was trained on yet.

        Raises:
            GKDDataError: Nothing was trained on yet, and nothing will be.
        """
        if self.has_ended(epoch):
            return []
        self._ended_epoch = None
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
                "The ranks' shards of the training stream differ in length: an epoch ends with the shortest, and what "
                "is left of the others is not trained on in it."
            )
        return []

    def _too_few(self, lacking: int, num_batches: int) -> GKDDataError:
        if lacking:
            return GKDDataError(
                f"the training set gave less than one step: {lacking} of {self._ranks.size} ranks had fewer than "
                f"{num_batches} batches (gradient_accumulation_steps). Give it more rows, or use fewer ranks or "
                "smaller batches; the log counts the rows that were dropped, by reason"
            )
        return GKDDataError(
            "the training set gave no batch: no row of it can be used; the log counts the rows that were dropped, by "
            "reason"
        )


@dataclass(frozen=True)
class Epoch:
    """An epoch that is being trained on, before its next window.

    `batches` are what is left of it, and `has_length` says whether its length is known. `num_batches` is how many
    micro-batches the next window has, and `accumulation` how many a window behind it has; `batch_size` how many samples
    a rank's micro-batch is configured to have. `max_steps` is the length of the run. `is_first` says that nothing was
    trained on yet.
    """

    loader: WindowLoader
    batches: Iterator[Any]
    has_length: bool
    num_batches: int
    accumulation: int
    batch_size: int
    max_steps: int
    is_first: bool

    def take(self, num_batches: int, *, is_first: bool) -> list[dict[str, Any]]:
        """Return the batches of the next window; see `WindowLoader.take`."""
        return self.loader.take(self.batches, num_batches, has_length=self.has_length, is_first=is_first)

    def later(self) -> Epoch:
        """Return the epoch before a window behind the next one."""
        return replace(self, num_batches=self.accumulation, is_first=False)

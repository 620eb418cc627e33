"""Whether the caches of a run have all rows of a dataset, checked before the first is drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import TrainingArguments
from transformers.utils.logging import tqdm

from gkd_trainer.batch_keys import TEACHER_INDEX
from gkd_trainer.data import IMAGE_COLUMNS, only_pads
from gkd_trainer.errors import GKDDataError
from gkd_trainer.teachers import CachedTeacher, ContextTeacher, RoutedTeachers, Teacher, WeightedTeachers
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)

MAX_LOOKED_UP = 20_000
"""How many rows of a dataset are looked up, each at the price of loading it: of more, that many at even distances."""


@dataclass(frozen=True)
class CollatedRows:
    """Rows of a prepared dataset, at most MAX_LOOKED_UP, one per batch, with their numbers; collated as they are drawn.

    `columns` returns those that the collator gets; None for all. `is_quiet` shows no progress.
    """

    dataset: datasets.Dataset | list[Any]
    collator: Any
    columns: Callable[[], Collection[str] | None]
    is_quiet: bool = False

    def __iter__(self) -> Iterator[tuple[int, TokenBatch]]:
        columns = self.columns()
        step = max(1, -(-len(self) // MAX_LOOKED_UP))
        for number in tqdm(range(0, len(self), step), desc="Looking up rows", disable=self.is_quiet):
            row = self.dataset[number]
            read = row if columns is None else {name: row[name] for name in row if name in columns}
            yield number, TokenBatch.from_inputs(self.collator([read]))

    def __len__(self) -> int:
        return len(self.dataset)

    @classmethod
    def of(
        cls, dataset: Any, collator: Any, columns: Callable[[], Collection[str] | None], *, is_quiet: bool = False
    ) -> CollatedRows | None:
        """Return the rows; None if it is unknown what the collator makes of them, or if collating reads images."""
        is_fixed = isinstance(dataset, datasets.Dataset | list)
        has_images = not set(IMAGE_COLUMNS).isdisjoint(getattr(dataset, "column_names", None) or ())
        is_known = is_fixed and only_pads(collator) and not has_images
        return cls(dataset, collator, columns, is_quiet) if is_known else None


def check_rows(teacher: Teacher, rows: CollatedRows | None, name: str, *, are_all_drawn: bool) -> None:
    """Refuse rows of the dataset `name` that a cache lacks; only warn of them if not all rows will be drawn.

    Raises GKDError: see `CachedTeacher.check_rows`.
    """
    for cached, index in _caches(teacher):
        try:
            cached.check_rows(rows if rows is None or index is None else _routed_to(index, rows), name)
        except GKDDataError as error:
            if are_all_drawn:
                raise
            logger.warning("%s The run ends if it draws such a row.", error)


def has_own_loader(trainer: type, known: Collection[type]) -> bool:
    """Return whether a class of a trainer, other than those known, chooses the rows to train on, or their order."""
    names = {"get_train_dataloader", "_get_train_sampler"}
    return any(not names.isdisjoint(vars(each)) for each in trainer.__mro__ if each not in known)


def trains_on_all(args: TrainingArguments, n_rows: int) -> bool:
    """Return whether Trainer's own loader surely draws all of so many rows to train on."""
    if args.dataloader_drop_last:
        return False
    if args.max_steps <= 0:
        return args.num_train_epochs >= 1
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return bool(args.max_steps * batch_size >= n_rows)


def _caches(teacher: Teacher, index: int | None = None) -> Iterator[tuple[CachedTeacher, int | None]]:
    """Yield the caches that are asked for rows, each with its TEACHER_INDEX if only for those of one.

    What a composite of a user's own asks for is unknown.
    """
    if isinstance(teacher, CachedTeacher):
        yield teacher, index
    elif isinstance(teacher, RoutedTeachers | WeightedTeachers | ContextTeacher):
        for number, inner in enumerate(teacher.teachers):
            yield from _caches(inner, number if isinstance(teacher, RoutedTeachers) else index)


def _routed_to(index: int, rows: CollatedRows) -> Iterator[tuple[int, TokenBatch]]:
    """Yield the rows of one of several teachers."""
    for number, batch in rows:
        index_B = batch.side.get(TEACHER_INDEX)
        if index_B is not None and int(index_B[0]) == index:
            yield number, batch

"""Several teachers, one for each sample.

Shapes: B batch, N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gkd_trainer.batch_keys import TEACHER_INDEX
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.signals import GroupedSignal, Signal
from gkd_trainer.teachers.base import Teacher, all_teachers
from gkd_trainer.teachers.several import SeveralTeachers
from gkd_trainer.types import TokenBatch


class RoutedTeachers(SeveralTeachers):
    """Several named teachers: each sample is compared with one of them, named by its row.

    A teacher scores only its own samples, so several cost about as much as one. A teacher without samples in a batch
    still scores an empty batch, since it may have to take part in exchanges between ranks.

    Args:
        teachers: The teachers by name.
        route: Returns the name of a row's teacher, given the row as the dataset has it, before any formatting_func.
            None reads the row's `column`.
        column: The column of names.
        offload: See SeveralTeachers.

    Raises:
        GKDTeacherError: See SeveralTeachers; or a teacher contains RoutedTeachers itself.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        route: Callable[[Mapping[str, Any]], str] | None = None,
        *,
        column: str = "teacher",
        offload: bool = False,
    ) -> None:
        super().__init__(teachers, offload=offload)
        for name, teacher in teachers.items():
            if any(isinstance(each, RoutedTeachers) for each in all_teachers(teacher)):
                raise GKDTeacherError(
                    f"the teacher {name!r} contains RoutedTeachers itself, but a row names only one teacher: name all "
                    "teachers in one RoutedTeachers"
                )
        self.route, self.column = route, column

    @property
    def is_routed(self) -> bool:
        """True: each sample has one teacher."""
        return True

    def score(self, batch: TokenBatch) -> Signal:
        """Return the predictions of each sample's teacher: a GroupedSignal, or a plain one if there is only one group.

        Raises:
            GKDTeacherError: The batch does not say which sample has which teacher.
            GKDDataError: A sample's teacher is missing, or not one of these.
        """
        index_B = batch.side.get(TEACHER_INDEX)
        if index_B is None:
            raise GKDTeacherError(
                f"the batch has no {TEACHER_INDEX} [B], so the teacher of each sample is unknown. Datasets get it "
                f"from their column {self.column!r} or from `route`; a collator that makes its own samples, or a "
                "dataset that is not prepared here (skip_prepare_dataset), must return it"
            )
        samples = self._samples_by_teacher(batch.on_host.side[TEACHER_INDEX].tolist())
        parts = [batch.of_samples(rows) for rows in samples]
        counts = [part.n_scored for part in parts]
        signals = {}
        for name, rows, part, count in zip(self.names, samples, parts, counts, strict=True):
            # Weights that wait on the CPU are whole, so no other rank needs this one's forward.
            if rows or name not in self._waiting or len(index_B) == 0:
                signals[name] = (self._score_by(name, part), count)
        with_positions = [signal for signal, count in signals.values() if count]
        if len(with_positions) <= 1:
            return with_positions[0] if with_positions else next(iter(signals.values()))[0]
        order_N = torch.argsort(index_B[batch.rows_N], stable=True)
        return GroupedSignal(order_N, tuple(signal for signal, _ in signals.values()))

    def _samples_by_teacher(self, indices: list[int]) -> list[list[int]]:
        samples: list[list[int]] = [[] for _ in self.names]
        for row, index in enumerate(indices):
            if not 0 <= index < len(samples):
                raise GKDDataError(
                    f"sample {row} of a batch has the {TEACHER_INDEX} {index}, but there are {len(samples)} teachers, "
                    f"{', '.join(self.names)}, counted from 0 (-1 is a row without one): give each row its teacher"
                )
            samples[index].append(row)
        return samples

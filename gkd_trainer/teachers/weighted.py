"""Several teachers whose divergences are summed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import Signal, SummedSignal
from gkd_trainer.teacher_checks import check_teacher_weights
from gkd_trainer.teachers.base import Teacher, all_teachers
from gkd_trainer.teachers.several import SeveralTeachers
from gkd_trainer.types import TokenBatch


class WeightedTeachers(SeveralTeachers):
    """Several named teachers: the student's divergence from all of them, averaged by weight.

    Every teacher scores every sample. Unlike a mixture of the teachers' distributions, this is
    Σ weight·D(student, teacher) / Σ weight, so that the loss keeps the scale of a single teacher's.

    Args:
        teachers: The teachers by name.
        weights: The weight of each teacher, by the same names, positive and finite. Only their ratios matter; None
            weights all equally.
        offload: See SeveralTeachers.

    Raises:
        GKDTeacherError: See SeveralTeachers; or a teacher contains several itself.
        GKDConfigError: The weights are not as described.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None = None, *, offload: bool = False
    ) -> None:
        super().__init__(teachers, offload=offload)
        for name, teacher in teachers.items():
            if any(isinstance(each, SeveralTeachers) for each in all_teachers(teacher)):
                raise GKDTeacherError(
                    f"the teacher {name!r} contains several teachers itself: name all of them in one WeightedTeachers "
                    "(RoutedTeachers may contain WeightedTeachers)"
                )
        weights = dict.fromkeys(teachers, 1.0) if weights is None else weights
        check_teacher_weights(weights, list(teachers), "weights")
        total = math.fsum(weights.values())
        self._weights = {name: float(weights[name]) / total for name in teachers}

    @property
    def is_routed(self) -> bool:
        """False: each sample has all teachers."""
        return False

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each teacher by name; their sum is 1."""
        return dict(self._weights)

    def score(self, batch: TokenBatch) -> Signal:
        """Return the predictions of all teachers, to be compared with each and summed."""
        terms = tuple(self._score_by(name, batch) for name in self.names)
        return SummedSignal(terms, tuple(self._weights.values()))

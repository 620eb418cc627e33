"""What composites of several named teachers share: their names, their vocabulary, and weights that wait on the CPU."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import torch
from transformers import PreTrainedTokenizerBase

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import Signal
from gkd_trainer.teachers.base import AligningTeacher, CompositeTeacher, Teacher, all_teachers
from gkd_trainer.teachers.offload import WaitingWeights
from gkd_trainer.teachers.vocabulary import difference
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)


class SeveralTeachers(CompositeTeacher):
    """Several named teachers of one student, with the same tokenizer.

    Args:
        teachers: The teachers by name.
        offload: Whether the weights of those in this process wait on the CPU, in pinned memory, while the others work.
            Nothing moves on a CPU. Models that are quantised, sharded, or placed by a device map stay where they are.

    Raises:
        GKDTeacherError: There are no teachers, one is not a Teacher, or their tokenizers differ or are not the
            student's.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, offload: bool = False) -> None:
        if not teachers or not all(isinstance(name, str) and name for name in teachers):
            raise GKDTeacherError(
                f"expected teachers by name, such as {{'math': FrozenTeacher(...)}}; got {list(teachers)}"
            )
        for name, teacher in teachers.items():
            if not isinstance(teacher, Teacher):
                raise GKDTeacherError(
                    f"expected a Teacher as {name!r}; got {type(teacher).__name__}: FrozenTeacher(model) makes one of "
                    "a model, and FrozenTeacher.from_pretrained of a name"
                )
            if any(isinstance(each, AligningTeacher) for each in all_teachers(teacher)):
                raise GKDTeacherError(
                    f"the teacher {name!r} reads other tokens than the student's, but several teachers are compared at "
                    "the same tokens of the student: train with only that one, or use teachers with the student's "
                    "tokenizer"
                )
        self._teachers = dict(teachers)
        self._offload = offload
        self._waiting: dict[str, WaitingWeights] = {}
        self.tokenizer = _with_shared_template(list(teachers.values()))
        self.shares_weights = any(teacher.shares_weights for teacher in teachers.values())  # type: ignore[misc]
        _require_equal_vocabularies(self._teachers)

    @property
    @abstractmethod
    def is_routed(self) -> bool:
        """Whether each sample has one of the teachers, else all of them."""

    @property
    @final
    def names(self) -> tuple[str, ...]:
        """The names of the teachers, in their order."""
        return tuple(self._teachers)

    @property
    @final
    def teachers(self) -> Sequence[Teacher]:
        """The teachers, in the order of their names."""
        return tuple(self._teachers.values())

    @property
    @final
    def vocab_size(self) -> int | None:
        """How many tokens all of them predict over: if their heads differ in padding, those of the tokenizer."""
        sizes = {teacher.vocab_size for teacher in self.teachers if teacher.vocab_size is not None}
        if len(sizes) > 1 and self.vocabulary is not None:
            return min(*sizes, max(self.vocabulary.values()) + 1)
        return min(sizes, default=None)

    @property
    @final
    def top_k(self) -> int | None:
        """The most top tokens that any of them gives; None if all give full distributions."""
        return max((teacher.top_k for teacher in self.teachers if teacher.top_k is not None), default=None)

    @property
    @final
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of their tokenizer; None if none of them knows it."""
        return next((teacher.vocabulary for teacher in self.teachers if teacher.vocabulary is not None), None)

    @property
    @final
    def model(self) -> None:
        """None: there are several models; `all_teachers` gives the teachers that have them."""
        return None

    @property
    @final
    def is_local(self) -> bool:
        """Whether all of them compute in this process."""
        return all(teacher.is_local for teacher in self.teachers)

    @property
    @final
    def can_generate(self) -> bool:
        """False: `seq_kd` needs one model."""
        return False

    @final
    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Prepare the teachers one by one; with `offload`, each leaves the device before the next arrives.

        Raises GKDTeacherError if their tokenizers differ, or can't be compared and their sizes differ.
        """
        for name, teacher in self._teachers.items():
            teacher.prepare(device, tokenizer, max_length)
            if self._offload:
                waiting = WaitingWeights.of(teacher, name, device)
                if waiting is not None:
                    self._waiting[name] = waiting
        _require_equal_vocabularies(self._teachers)
        _require_known_tokens(self._teachers)

    @final
    def _score_by(self, name: str, batch: TokenBatch) -> Signal:
        """Return the predictions of one teacher, whose weights are on the device for as long as it takes."""
        waiting = self._waiting.get(name)
        if waiting is None:
            return self._teachers[name].score(batch)
        with waiting.at_work():
            return waiting.detached(self._teachers[name].score(batch))


def several_in(teacher: Teacher) -> SeveralTeachers | None:
    """Return the outermost of the composites of several teachers in a teacher, if there is one."""
    return next((each for each in all_teachers(teacher) if isinstance(each, SeveralTeachers)), None)


def _with_shared_template(teachers: Sequence[Teacher]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the first teacher if the chat templates of all are equal; else the student's is used."""
    tokenizers = [teacher.tokenizer for teacher in teachers]
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers]
    return tokenizers[0] if all(template == templates[0] for template in templates) else None


def _require_equal_vocabularies(teachers: Mapping[str, Teacher]) -> None:
    known = {name: teacher.vocabulary for name, teacher in teachers.items() if teacher.vocabulary is not None}
    for first in known:
        for other in known:
            if known[first] != known[other]:
                raise GKDTeacherError(
                    f"the teachers {first!r} and {other!r} have different tokenizers, so one student can't be compared "
                    f"with both: {difference(known[first], known[other], (f'teacher {first}', f'teacher {other}'))}. "
                    "Use teachers with the student's tokenizer"
                )
        break


def _require_known_tokens(teachers: Mapping[str, Teacher]) -> None:
    sizes = {name: teacher.vocab_size for name, teacher in teachers.items() if teacher.vocab_size is not None}
    unknown = [name for name, teacher in teachers.items() if teacher.vocabulary is None]
    if unknown and len(set(sizes.values())) > 1:
        raise GKDTeacherError(
            f"the teachers predict over different numbers of tokens ({sizes}), and the tokenizer of "
            f"{', '.join(unknown)} is unknown, so the shared tokens can't be determined: pass FrozenTeacher(model, "
            "tokenizer=...)"
        )
    if 0 < len(unknown) < len(teachers):
        logger.warning(
            "No tokenizer of the teachers %s was found: only the equal vocabulary sizes suggest that they use the same "
            "token ids as the others.",
            ", ".join(unknown),
        )

"""The description of a teacher for its student's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

from gkd_trainer.models.loading import name_of
from gkd_trainer.teachers.base import AligningTeacher, Teacher
from gkd_trainer.teachers.context import ContextTeacher
from gkd_trainer.teachers.other_tokenizer import OtherTokenizerTeacher
from gkd_trainer.teachers.several import SeveralTeachers
from gkd_trainer.teachers.shared import SelfTeacher
from gkd_trainer.teachers.vllm_hidden import HiddenStateServerTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher
from gkd_trainer.teachers.weighted import WeightedTeachers


@dataclass(frozen=True)
class TeacherDescription:
    """A teacher's name or folder, the URLs of its servers, if any, and how many top tokens it gives (None: all).

    Several teachers have one name or folder each, by the label under which a reader knows them. `vocabulary_mode` is
    how a teacher with another tokenizer is compared (one of MODES).
    """

    name: str | Mapping[str, str]
    base_urls: Sequence[str]
    top_k: int | None
    vocabulary_mode: str | None = None

    @property
    def full_name(self) -> str:
        """The name in one line, by which a cache knows a teacher whose weights are unknown."""
        if isinstance(self.name, str):
            return self.name
        return "; ".join(f"{label}: {name}" for label, name in self.name.items())


@singledispatch
def describe(teacher: Teacher) -> TeacherDescription:
    """Return a teacher's description; register a function for a class that has more than its model's name."""
    return TeacherDescription(name_of(teacher.model) or type(teacher.model or teacher).__name__, (), teacher.top_k)


@describe.register
def _(teacher: HiddenStateServerTeacher) -> TeacherDescription:
    checkpoint, label = teacher.checkpoint, teacher.served_as  # that of an adapter, of which this is the base
    name = checkpoint if label in (None, checkpoint) else {label: checkpoint}
    return TeacherDescription(name, teacher.base_urls, teacher.top_k)


@describe.register
def _(teacher: AligningTeacher) -> TeacherDescription:
    return describe(teacher.teachers[0])


@describe.register
def _(teacher: OtherTokenizerTeacher) -> TeacherDescription:
    return replace(describe(teacher.teachers[0]), vocabulary_mode=teacher.mode)


@describe.register
def _(teacher: VLLMServerTeacher) -> TeacherDescription:
    return TeacherDescription(teacher.model_name or type(teacher).__name__, teacher.base_urls, teacher.top_k)


@describe.register
def _(teacher: SeveralTeachers) -> TeacherDescription:
    names: dict[str, str] = {}
    urls: list[str] = []
    weights = teacher.weights if isinstance(teacher, WeightedTeachers) else {}
    for name, each in zip(teacher.names, teacher.teachers, strict=True):
        described = describe(each)
        label = f"{name} (weight {weights[name]:.3g})" if weights else name
        inner = {"": described.name} if isinstance(described.name, str) else described.name
        names |= {", ".join(filter(None, (label, part))): path for part, path in inner.items()}
        urls += described.base_urls
    return TeacherDescription(names, urls, teacher.top_k)


@describe.register
def _(teacher: ContextTeacher) -> TeacherDescription:
    return describe(*teacher.teachers)


@describe.register
def _(teacher: SelfTeacher) -> TeacherDescription:
    return TeacherDescription(f"the student itself ({teacher.source})", (), None)

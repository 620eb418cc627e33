"""The description of a teacher for its student's model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from gkd_trainer.models.loading import name_of
from gkd_trainer.teachers.base import AligningTeacher, Teacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher


@dataclass(frozen=True)
class TeacherDescription:
    """A teacher's name or folder, the URLs of its servers, if any, and how many top tokens it gives (None: all)."""

    name: str
    base_urls: Sequence[str]
    top_k: int | None


@singledispatch
def describe(teacher: Teacher) -> TeacherDescription:
    """Return a teacher's description; register a function for a class that has more than its model's name."""
    return TeacherDescription(name_of(teacher.model) or type(teacher.model or teacher).__name__, (), teacher.top_k)


@describe.register
def _(teacher: AligningTeacher) -> TeacherDescription:
    return describe(teacher.teachers[0])


@describe.register
def _(teacher: VLLMServerTeacher) -> TeacherDescription:
    return TeacherDescription(teacher.model_name or type(teacher).__name__, teacher.base_urls, teacher.top_k)

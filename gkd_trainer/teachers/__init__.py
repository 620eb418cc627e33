"""Teachers: a frozen model's predictions for the tokens trained on."""

from gkd_trainer.teachers.base import CompositeTeacher, StudentTeacher, Teacher, all_teachers
from gkd_trainer.teachers.build import build_teacher
from gkd_trainer.teachers.context import ContextTeacher
from gkd_trainer.teachers.description import TeacherDescription, describe
from gkd_trainer.teachers.frozen import FrozenTeacher
from gkd_trainer.teachers.shared import SelfTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher
from gkd_trainer.teachers.vocabulary import shared_vocabulary_size

__all__ = [
    "CompositeTeacher",
    "ContextTeacher",
    "FrozenTeacher",
    "SelfTeacher",
    "StudentTeacher",
    "Teacher",
    "TeacherDescription",
    "VLLMServerTeacher",
    "all_teachers",
    "build_teacher",
    "describe",
    "shared_vocabulary_size",
]

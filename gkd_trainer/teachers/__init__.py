"""Teachers: a frozen model's predictions for the tokens trained on."""

from gkd_trainer.teachers.base import AligningTeacher, Teacher, comparable
from gkd_trainer.teachers.build import build_teacher
from gkd_trainer.teachers.description import TeacherDescription, describe
from gkd_trainer.teachers.frozen import FrozenTeacher
from gkd_trainer.teachers.other_tokenizer import OtherTokenizerTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher
from gkd_trainer.teachers.vocabulary import shared_vocabulary_size

__all__ = [
    "AligningTeacher",
    "FrozenTeacher",
    "OtherTokenizerTeacher",
    "Teacher",
    "TeacherDescription",
    "VLLMServerTeacher",
    "build_teacher",
    "comparable",
    "describe",
    "shared_vocabulary_size",
]

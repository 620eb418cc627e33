"""Teachers: a frozen model's predictions for the tokens trained on."""

from gkd_trainer.teachers.base import (
    AligningTeacher,
    CompositeTeacher,
    StudentTeacher,
    Teacher,
    all_teachers,
    comparable,
    refuse_inference_tensors,
)
from gkd_trainer.teachers.build import build_teacher
from gkd_trainer.teachers.cached import CachedTeacher
from gkd_trainer.teachers.context import ContextTeacher
from gkd_trainer.teachers.description import TeacherDescription, describe
from gkd_trainer.teachers.frozen import FrozenTeacher
from gkd_trainer.teachers.other_tokenizer import OtherTokenizerTeacher
from gkd_trainer.teachers.router import RoutedTeachers
from gkd_trainer.teachers.several import SeveralTeachers, several_in
from gkd_trainer.teachers.shared import SelfTeacher
from gkd_trainer.teachers.vllm_hidden import HiddenStateServerTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher
from gkd_trainer.teachers.vocabulary import pad_tokens_of, shared_vocabulary_size
from gkd_trainer.teachers.weighted import WeightedTeachers

__all__ = [
    "AligningTeacher",
    "CachedTeacher",
    "CompositeTeacher",
    "ContextTeacher",
    "FrozenTeacher",
    "HiddenStateServerTeacher",
    "OtherTokenizerTeacher",
    "RoutedTeachers",
    "SelfTeacher",
    "SeveralTeachers",
    "StudentTeacher",
    "Teacher",
    "TeacherDescription",
    "VLLMServerTeacher",
    "WeightedTeachers",
    "all_teachers",
    "build_teacher",
    "comparable",
    "describe",
    "pad_tokens_of",
    "refuse_inference_tensors",
    "several_in",
    "shared_vocabulary_size",
]

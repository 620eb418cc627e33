"""Build a teacher from options and arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.loading import find_tokenizer, name_of
from gkd_trainer.teachers.base import AligningTeacher, Teacher, all_teachers
from gkd_trainer.teachers.cached import CachedTeacher
from gkd_trainer.teachers.frozen import FrozenTeacher
from gkd_trainer.teachers.other_tokenizer import OtherTokenizerTeacher
from gkd_trainer.teachers.router import RoutedTeachers
from gkd_trainer.teachers.shared import SelfTeacher
from gkd_trainer.teachers.vllm_hidden import HiddenStateServerTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher
from gkd_trainer.teachers.weighted import WeightedTeachers

TeacherModel = PreTrainedModel | PeftModel | PeftMixedModel | nn.Module | str | os.PathLike[str]
"""A teacher's model, or its name or path."""


def build_teacher(
    args: GKDArguments,
    *,
    teacher: Teacher | None = None,
    teacher_model: TeacherModel | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Return the teacher that the arguments specify.

    Args:
        args: The options, which may name a model, servers, the student or a cache.
        teacher: A teacher, returned unchanged; inside an OtherTokenizerTeacher if the options say so.
        teacher_model: A model, or its name or path.
        trust_remote_code: Whether Python code that comes with a model or its tokenizer may run.

    Raises:
        GKDTeacherError: There is no teacher, or more than one; options don't apply to it; or it can't be loaded.
    """
    if args.teacher_cache_dir is None:
        live = _live_teacher(args, teacher, teacher_model, trust_remote_code)
        built = _with_other_tokenizer(args, live, trust_remote_code)
    elif teacher is not None or (teacher_model is not None and args.teacher_cache_miss == "error"):
        raise GKDTeacherError(
            "got a teacher and args.teacher_cache_dir: keep one of them, or, for a teacher_model that scores the rows "
            "that the cache lacks, set teacher_cache_miss='teacher'"
        )
    else:
        scores_misses = args.teacher_cache_miss == "teacher"
        fallback = _live_teacher(args, None, teacher_model, trust_remote_code) if scores_misses else None
        built = CachedTeacher(args.teacher_cache_dir, fallback)
    for each in all_teachers(built):
        if isinstance(each, CachedTeacher):
            each.check_options(args)
    return built


def _live_teacher(
    args: GKDArguments, teacher: Teacher | None, teacher_model: TeacherModel | None, trust_remote_code: bool
) -> Teacher:
    name, urls, top_k = args.teacher_model_name_or_path, args.teacher_server_base_url, args.teacher_top_k
    paths = cast("dict[str, str] | None", args.teachers)  # JSON is parsed already
    _require_one(teacher, teacher_model, name, urls, paths, args.self_teacher)
    if paths is not None:
        return _several(args, paths, trust_remote_code)
    if urls is not None and args.teacher_server_signal == "hidden_states":
        return _hidden_state_teacher(args, urls, trust_remote_code)
    source = teacher_model if teacher_model is not None else name
    if teacher is None and isinstance(source, str | os.PathLike):
        init_kwargs = cast("dict[str, Any] | None", args.teacher_model_init_kwargs)  # JSON is parsed already
        options = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        return FrozenTeacher.from_pretrained(source, top_k=top_k, offload=args.teacher_offload, **options)
    if args.teacher_model_init_kwargs is not None:
        raise GKDTeacherError(
            "teacher_model_init_kwargs is for loading a teacher by name, but the given one is already loaded: leave it "
            "out, or pass the teacher's name"
        )
    if teacher is not None:
        if top_k is not None:
            raise GKDTeacherError(
                "teacher_top_k has no effect on a teacher passed as an object: pass top_k to that teacher instead"
            )
        if args.teacher_offload:
            raise GKDTeacherError(
                "teacher_offload has no effect on a teacher passed as an object: pass offload=True to that teacher "
                "instead"
            )
        return teacher
    if teacher_model is not None and not isinstance(teacher_model, str | os.PathLike):
        offload = args.teacher_offload
        return FrozenTeacher(teacher_model, trust_remote_code=trust_remote_code, top_k=top_k, offload=offload)
    if args.self_teacher is not None:
        return SelfTeacher(args.self_teacher, ema_decay=args.self_teacher_ema_decay)
    assert urls is not None  # the only case left
    own_default: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    return VLLMServerTeacher(
        urls,
        **own_default,
        model=args.teacher_server_model,
        api_token=args.teacher_server_api_token,
        server_timeout=args.vllm_server_timeout,
        request_timeout=args.vllm_request_timeout,
        checks=args.teacher_server_checks,
    )


def _with_other_tokenizer(args: GKDArguments, teacher: Teacher, trust_remote_code: bool) -> Teacher:
    mode, source = args.teacher_vocabulary_mode, args.teacher_tokenizer_name_or_path
    if mode == "same":
        return teacher
    if isinstance(teacher, AligningTeacher):
        raise GKDTeacherError(
            f"teacher_vocabulary_mode={mode!r} has no effect on a teacher that maps vocabularies itself: leave it out, "
            "or pass the teacher inside it"
        )
    tokenizer = None if source is None else find_tokenizer(source, trust_remote_code)
    if source is not None and tokenizer is None:
        raise GKDTeacherError(
            f"teacher_tokenizer_name_or_path={source!r} has no tokenizer: expected a folder with one, or a name on the "
            "hub"
        )
    return OtherTokenizerTeacher(teacher, tokenizer, mode=mode, min_matched_mass=args.teacher_min_matched_mass)


def _several(args: GKDArguments, paths: dict[str, str], trust_remote_code: bool) -> Teacher:
    init_kwargs = cast("dict[str, Any] | None", args.teacher_model_init_kwargs)
    options = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    teachers = {
        name: FrozenTeacher.from_pretrained(path, top_k=args.teacher_top_k, **options) for name, path in paths.items()
    }
    weights = cast("dict[str, float] | None", args.teacher_weights)
    if weights is not None:
        return WeightedTeachers(teachers, weights, offload=args.teacher_offload)
    return RoutedTeachers(teachers, column=args.teacher_column, offload=args.teacher_offload)


def _hidden_state_teacher(args: GKDArguments, urls: str | list[str], trust_remote_code: bool) -> Teacher:
    init_kwargs = dict(cast("dict[str, Any] | None", args.teacher_model_init_kwargs) or {})  # JSON is parsed already
    assert args.teacher_model_name_or_path is not None  # the configuration has checked it
    return HiddenStateServerTeacher(
        urls,
        args.teacher_model_name_or_path,
        dtype=args.teacher_server_dtype,
        model=args.teacher_server_model,
        api_token=args.teacher_server_api_token,
        server_timeout=args.vllm_server_timeout,
        request_timeout=args.vllm_request_timeout,
        checks=args.teacher_server_checks,
        trust_remote_code=init_kwargs.pop("trust_remote_code", trust_remote_code),
        init_kwargs=init_kwargs,
    )


def _require_one(
    teacher: Teacher | None,
    teacher_model: TeacherModel | None,
    name: str | None,
    urls: str | list[str] | None,
    paths: dict[str, str] | None,
    source: str | None,
) -> None:
    if isinstance(teacher_model, Teacher):
        raise GKDTeacherError(f"teacher_model is a {type(teacher_model).__name__}: pass a Teacher as teacher")
    if all(each is None for each in (teacher, teacher_model, name, urls, paths, source)):
        raise GKDTeacherError(
            "no teacher: pass teacher_model (a model, a name or a path), teacher (a Teacher), or set "
            "args.teacher_model_name_or_path, args.teachers, args.teacher_server_base_url, args.self_teacher or "
            "args.teacher_cache_dir"
        )
    if sum(each is not None for each in (teacher, teacher_model, urls, paths, source)) > 1:
        raise GKDTeacherError(
            "got more than one of teacher, teacher_model, args.teacher_server_base_url, args.teachers and "
            "args.self_teacher: keep one"
        )
    given = teacher_model if teacher_model is not None else teacher
    if given is not None and name is not None and not _is_named(given, name):
        raise GKDTeacherError(
            f"got a teacher that was not loaded from args.teacher_model_name_or_path={name!r}: keep only one of them"
        )


def _is_named(teacher: Teacher | TeacherModel, name: str) -> bool:
    if not isinstance(teacher, str | os.PathLike):
        teacher = name_of(teacher.model if isinstance(teacher, Teacher) else teacher)
    given, named = Path(teacher), Path(name)
    return given == named or (given.exists() and named.exists() and given.samefile(named))

"""Options turned into a teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.loading import name_of
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.frozen import FrozenTeacher
from gkd_trainer.teachers.vllm_server import VLLMServerTeacher


def build_teacher(args: Any, teacher: Teacher | None, teacher_model: Any, trust_remote_code: bool) -> Teacher:
    """Return the one teacher that was given, as an object, a model, a name or path, or the address of its servers.

    Raises GKDTeacherError where there is none, or more than one.
    """
    name, urls, top_k = args.teacher_model_name_or_path, args.teacher_server_base_url, args.teacher_top_k
    init_kwargs = args.teacher_model_init_kwargs
    if isinstance(teacher_model, Teacher):
        raise GKDTeacherError(f"teacher_model is a {type(teacher_model).__name__}: pass a Teacher as teacher")
    if teacher is None and teacher_model is None and name is None and urls is None:
        raise GKDTeacherError(
            "no teacher: pass teacher_model (a model, a name or a path), teacher (a Teacher), or set "
            "args.teacher_model_name_or_path or args.teacher_server_base_url"
        )
    if (teacher is not None) + (teacher_model is not None) + (urls is not None) > 1:
        raise GKDTeacherError("got more than one of teacher, teacher_model and args.teacher_server_base_url: keep one")
    given = teacher_model if teacher_model is not None else teacher
    if given is not None and name is not None and not _is_named(given, name):
        raise GKDTeacherError(
            f"got a teacher and args.teacher_model_name_or_path={name!r}, which the teacher was not loaded from: keep "
            "the one that is to teach"
        )
    source = teacher_model if teacher_model is not None else name
    if teacher is None and isinstance(source, str | os.PathLike):
        options = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        return FrozenTeacher.from_pretrained(source, top_k=top_k, **options)
    if init_kwargs is not None:
        raise GKDTeacherError(
            "teacher_model_init_kwargs load a teacher by name, but the teacher given is loaded already: drop them, or "
            "pass the teacher's name"
        )
    if teacher is not None:
        if top_k is not None:
            raise GKDTeacherError(
                "teacher_top_k is set for a teacher that is given as an object: pass it top_k instead"
            )
        return teacher
    if teacher_model is not None:
        return FrozenTeacher(teacher_model, trust_remote_code=trust_remote_code, top_k=top_k)
    return VLLMServerTeacher(
        urls,
        **({} if top_k is None else {"top_k": top_k}),
        api_token=args.teacher_server_api_token,
        server_timeout=args.vllm_server_timeout,
        request_timeout=args.vllm_request_timeout,
        checks=args.teacher_server_checks,
    )


def _is_named(teacher: Any, name: str) -> bool:
    if not isinstance(teacher, str | os.PathLike):
        teacher = name_of(teacher.model if isinstance(teacher, Teacher) else teacher)
    given, named = Path(teacher), Path(name)
    return given == named or (given.exists() and named.exists() and given.samefile(named))

"""Check which teacher the options ask for; raise GKDConfigError for those that have no meaning together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf
from numbers import Real
from typing import Any

from gkd_trainer.config_effects import Run
from gkd_trainer.config_values import check
from gkd_trainer.divergence.options import check_mode, check_tail, check_top_k_temperature
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import redacted


def check_teacher(run: Run) -> None:
    """Raise GKDConfigError for options of the teacher that have no meaning together, as far as the run is known."""
    _check_servers(run.args)
    _check_several(run.args)
    _check_offload(run.args)
    _check_self_teacher(run.args)
    check_loss_temperature(run)
    check_tail(run.args.teacher_tail, run.args.teacher_top_k, "teacher_tail")
    _check_other_vocabulary(run.args)
    check_cache(run)


def check_loss_temperature(run: Run) -> None:
    """Raise GKDConfigError for a loss_temperature other than 1 and a teacher that gives only its top tokens.

    A configuration shows such a teacher by its servers or by teacher_top_k; the trainer knows of others.
    """
    args = run.args
    sends_top_tokens = args.teacher_server_base_url and args.teacher_server_signal == "top_k"
    has_top_tokens = run.has_top_tokens or sends_top_tokens or args.teacher_top_k is not None
    if has_top_tokens:
        check_top_k_temperature(args.loss_temperature, "loss_temperature")


def check_cache(run: Run) -> None:
    """Raise GKDConfigError for completions that are generated for a teacher that has only the predictions of a cache.

    A configuration shows such a teacher by teacher_cache_dir; the trainer knows of others.
    """
    args = run.args
    is_alone = args.teacher_cache_dir is not None and args.teacher_cache_miss == "error"
    if is_alone and (args.teacher_model_name_or_path is not None or args.teacher_server_base_url is not None):
        raise GKDConfigError(
            "teacher_cache_dir replaces the teacher: leave teacher_model_name_or_path and teacher_server_base_url out, "
            "or set teacher_cache_miss='teacher' to have the teacher score rows that the cache lacks"
        )
    if args.teacher_cache_dir is not None and args.teachers is not None:
        raise GKDConfigError(
            "teacher_cache_dir holds the predictions of one teacher, but teachers names several: set one of them, or "
            "pass teacher=RoutedTeachers({name: CachedTeacher(folder), ...})"
        )
    if (is_alone or run.has_only_cache) and args.generates_anywhere:
        option = "eval_on_policy=True" if not args.generates else "seq_kd=True" if args.seq_kd else "lmbda above 0"
        raise GKDConfigError(
            f"{option} generates completions, for which a cached teacher has no predictions: set lmbda=0, seq_kd=False "
            "and eval_on_policy=False, or have a teacher score them (teacher_cache_miss='teacher', CachedTeacher's "
            "fallback)"
        )


def check_teacher_weights(weights: Mapping[str, Any], names: Collection[str], option: str) -> None:
    """Raise GKDConfigError unless each teacher of `names`, and no other, has a positive and finite weight."""
    if set(weights) != set(names):
        raise GKDConfigError(
            f"{option} must have a weight for each of the teachers {', '.join(names)}; got {', '.join(weights)}"
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        expected = "positive and finite (leave a teacher out to give it no weight)"
        check(f"{option} of {name}", repr(weight), is_number and 0 < weight < inf, expected)


def _check_servers(args: Any) -> None:
    if args.teacher_server_signal == "top_k":
        if args.teacher_server_base_url and args.teacher_model_name_or_path is not None:
            raise GKDConfigError(
                "got both teacher_server_base_url and teacher_model_name_or_path: set one of them, or "
                "teacher_server_signal='hidden_states', which needs both"
            )
        return
    missing = [
        name for name in ("teacher_server_base_url", "teacher_model_name_or_path") if getattr(args, name) is None
    ]
    if missing:
        raise GKDConfigError(
            "teacher_server_signal='hidden_states' needs the teacher's servers and the checkpoint that they serve, "
            f"whose head is read here: set {' and '.join(missing)}"
        )
    if args.teacher_top_k is not None:
        raise GKDConfigError(
            f"teacher_top_k={args.teacher_top_k} has no effect under teacher_server_signal='hidden_states', which "
            "gives the full distribution: leave it out, or set teacher_server_signal='top_k'"
        )


def _check_several(args: Any) -> None:
    if args.teachers is None:
        return
    is_valid = bool(args.teachers) and all(isinstance(path, str) and path for path in args.teachers.values())
    expected = "names of models or folders by a name of your own, at least one; pass other teachers as an object"
    check("teachers", repr(redacted(args.teachers)), is_valid and all(args.teachers), expected)
    for name in ("teacher_model_name_or_path", "teacher_server_base_url"):
        if getattr(args, name) is not None:
            raise GKDConfigError(f"got both teachers and {name}: set one of them")
    if args.teacher_weights is not None:
        check_teacher_weights(args.teacher_weights, args.teachers, "teacher_weights")


def _check_offload(args: Any) -> None:
    if args.teacher_offload and args.seq_kd:
        raise GKDConfigError(
            "seq_kd=True has the teacher generate, for which its weights must stay on the device, but "
            "teacher_offload=True keeps them in the CPU's memory: set one of them to False"
        )


def _check_self_teacher(args: Any) -> None:
    for name in (
        "teacher_model_name_or_path",
        "teacher_server_base_url",
        "teachers",
        "teacher_cache_dir",
        "teacher_top_k",
    ):
        if args.self_teacher is not None and getattr(args, name) is not None:
            raise GKDConfigError(
                f"self_teacher={args.self_teacher!r} makes the student its own teacher, with full distributions, so "
                f"{name} has no meaning: leave one of them out"
            )


def _check_other_vocabulary(args: Any) -> None:
    mode = args.teacher_vocabulary_mode
    if mode == "same":
        return
    check_mode(mode, args.divergence, "teacher_vocabulary_mode")
    if args.seq_kd:
        raise GKDConfigError(
            f"teacher_vocabulary_mode={mode!r} is for a teacher that reads other token ids than the student's, so it "
            "can't complete the student's prompts: set seq_kd=False"
        )
    for name in ("teachers", "teacher_cache_dir", "self_teacher"):
        if getattr(args, name) is not None:
            raise GKDConfigError(
                f"teacher_vocabulary_mode={mode!r} is for one teacher that reads other token ids, but {name} needs the "
                "student's: leave one of them out"
            )
    has_top_tokens = args.teacher_server_base_url and args.teacher_server_signal == "top_k"
    if mode != "matched" and (has_top_tokens or args.teacher_top_k is not None):
        raise GKDConfigError(
            f"teacher_vocabulary_mode={mode!r} needs the teacher's full distributions: set it to 'matched', or use a "
            "teacher in this process without teacher_top_k"
        )

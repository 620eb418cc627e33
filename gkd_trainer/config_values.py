"""Parse the options, and check their values one by one; raise GKDConfigError for those that are invalid."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Collection, Iterable
from math import inf
from numbers import Integral, Real
from typing import Any, get_args

from gkd_trainer.divergence.options import check_choice
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import redacted, redacted_source
from gkd_trainer.urls import ServerURL

# Options that are None or at least 1.
_COUNTS = (
    "max_new_tokens",
    "num_completions_to_print",
    "rollout_batch_size",
    "rollout_steps",
    "teacher_top_k",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
)

# For each annotated type, the type that a value must have, and its name in an error.
_TYPES: dict[Any, tuple[Any, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
    type(None): (type(None), "None"),
}


def check_types(args: Any, owner: type, parsed: Collection[str]) -> None:
    """Raise GKDConfigError for the first option declared by `owner` whose value has the wrong type.

    Those in `parsed` were checked when they were parsed.
    """
    hints = inspect.get_annotations(owner, eval_str=True)
    for name in hints.keys() - parsed:
        expected = [_TYPES[hint] for hint in get_args(hints[name]) or (hints[name],)]
        value = getattr(args, name)
        is_valid = any(
            isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in expected
        )
        check(name, repr(redacted(value, name)), is_valid, " or ".join(words for _, words in expected))


def set_floats(args: Any, owner: type) -> None:
    """Make floats of the whole numbers given for options of floats: a hyperparameter search keeps a value's type."""
    for name, hint in inspect.get_annotations(owner, eval_str=True).items():
        value = getattr(args, name)
        if float in (get_args(hint) or (hint,)) and isinstance(value, Integral):
            setattr(args, name, float(value))


def check_ranges(args: Any, options: Iterable[dataclasses.Field[Any]]) -> None:
    """Raise GKDConfigError for the first number out of range, or value not among the choices in `options`."""
    in_unit = "in [0, 1]"
    check("lmbda", args.lmbda, 0 <= args.lmbda <= 1, f"{in_unit} (0 is all data, 1 is all student)")
    if args.lmbda_end is not None:
        check("lmbda_end", args.lmbda_end, 0 <= args.lmbda_end <= 1, in_unit)
    check("teacher_min_matched_mass", args.teacher_min_matched_mass, 0 <= args.teacher_min_matched_mass <= 1, in_unit)
    check("ce_weight", args.ce_weight, 0 <= args.ce_weight <= 1, in_unit)
    decay = args.self_teacher_ema_decay
    check("self_teacher_ema_decay", decay, 0 <= decay < 1, "in [0, 1) (0 is the student's last step)")
    finite = "above 0 and finite"
    check("temperature", args.temperature, 0 < args.temperature < inf, f"{finite} (1 samples the student as it is)")
    check("top_p", args.top_p, 0 < args.top_p <= 1, "in (0, 1] (1 keeps every token)")
    check("top_k", args.top_k, args.top_k >= 0, "0 (keeps every token) or more")
    if args.min_p is not None:
        check("min_p", args.min_p, 0 <= args.min_p <= 1, in_unit)
    check("repetition_penalty", args.repetition_penalty, 0 < args.repetition_penalty < inf, f"{finite} (1 is none)")
    if args.loss_workspace_mb is not None:
        check("loss_workspace_mb", args.loss_workspace_mb, 1 <= args.loss_workspace_mb < inf, "at least 1")
    for name in ("vllm_server_timeout", "vllm_request_timeout"):
        check(name, getattr(args, name), 0 < getattr(args, name) < inf, finite)
    check(
        "vllm_gpu_memory_utilization",
        args.vllm_gpu_memory_utilization,
        0 < args.vllm_gpu_memory_utilization <= 1,
        "in (0, 1]",
    )
    check("report_samples", args.report_samples, args.report_samples >= 0, "0 (keeps nothing) or more")
    for name in _COUNTS:
        value = getattr(args, name)
        check(name, value, value is None or value >= 1, "at least 1")
    if args.max_length is not None:
        check("max_length", args.max_length, args.max_length >= 2, "at least 2 (a prompt and a completion)")
    for option in options:
        choices = option.metadata.get("choices")
        if choices is not None:
            check_choice(option.name, redacted(getattr(args, option.name)), choices)


def check(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Raise GKDConfigError, which says what was expected and what came, unless a value is valid."""
    if not is_valid:
        raise GKDConfigError(f"{name} must be {expected}; got {redacted(str(value))}")


def parsed_urls(name: str, value: list[str] | str | None) -> list[str] | None:
    """Return URLs as a list; the command line passes them as one string."""
    # Only before a scheme: a password may contain a comma.
    urls = re.split(r"\s*,\s*(?=https?://)", value.strip()) if isinstance(value, str) else value
    is_list = urls is None or (isinstance(urls, list) and bool(urls) and all(isinstance(url, str) for url in urls))
    check(name, repr(value), is_list, "URLs such as http://127.0.0.1:8000, as a list or separated by commas")
    return None if urls is None else [ServerURL(url, name) for url in urls]


def parsed_folders(name: str, value: Any) -> list[str] | None:
    """Return paths of folders as a list; a single one may be given as it is."""
    folders = list(value) if isinstance(value, list | tuple) else value if value is None else [value]
    is_valid = folders is None or (bool(folders) and all(isinstance(each, str | os.PathLike) for each in folders))
    check(name, repr(value), is_valid, "a folder or a list of folders")
    return None if folders is None else [os.fspath(each) for each in folders]


def parsed_json(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Return a dictionary, which the command line passes as JSON."""
    if value is None or isinstance(value, dict):
        return value
    came = redacted_source(value) if isinstance(value, str) else repr(redacted(value))
    try:
        parsed = json.loads(value)
    except (TypeError, json.JSONDecodeError) as error:
        raise GKDConfigError(f"{name} must be a dictionary or a JSON object; got {came}: {error}") from error
    if not isinstance(parsed, dict):
        raise GKDConfigError(f"{name} must be a dictionary or a JSON object; got {came}")
    return parsed

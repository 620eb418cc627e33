"""Which options have an effect in which runs: one table of what each needs.

It refuses nothing. `config_checks` refuses some options without effect; the trainer warns about the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """A GKDArguments and facts about its trainer: they decide which options have an effect and may be combined.

    The defaults are those of a configuration without a trainer.

    Attributes:
        args: The configuration.
        has_top_tokens: Whether the teacher gives only its top tokens; None if unknown.
        has_only_cache: Whether the teacher has predictions for only the rows of a cache; None if unknown.
        loads_student: Whether the student is given by name.
        builds_rollouts: Whether the trainer builds the rollout engine, since none is passed.
        has_eval_rows: Whether there is a dataset to evaluate on, whose rows may be prompts; None if unknown.
    """

    args: Any
    has_top_tokens: bool | None = None
    has_only_cache: bool | None = None
    loads_student: bool = True
    builds_rollouts: bool = True
    has_eval_rows: bool | None = None


def unused_options(run: Run) -> list[tuple[str, str]]:
    """Return the options that were changed but have no effect in a run, each with what it needs."""
    defaults = {option.name: option.default for option in dataclasses.fields(run.args)}
    return [
        (name, needs)
        for names, needs, are_met in NEEDS
        if not are_met(run)
        for name in names.split()
        if name in defaults and getattr(run.args, name) != defaults[name]
    ]


def _uses_vllm(run: Run) -> bool:
    return bool(run.builds_rollouts and run.args.use_vllm)


def _uses_vllm_server(run: Run) -> bool:
    return bool(run.builds_rollouts and run.args.uses_vllm_server)


def _has_teacher_server(run: Run) -> bool:
    return run.args.teacher_server_base_url is not None


def _has_own_weights(run: Run) -> bool:
    args = run.args
    is_only_cached = run.has_only_cache or (args.teacher_cache_dir is not None and args.teacher_cache_miss == "error")
    return args.teacher_server_base_url is None and args.self_teacher is None and not is_only_cached


def _is_jsd(run: Run) -> bool:
    return bool(run.args.divergence == "jsd") and run.args.teacher_vocabulary_mode != "uld"


NEEDS: tuple[tuple[str, str, Callable[[Run], bool]], ...] = (
    (
        "ce_weight seq_kd",
        "off-policy samples (lmbda below 1)",
        lambda run: not run.args.is_always_on_policy,
    ),
    (
        "lmbda_granularity",
        "both on- and off-policy samples (lmbda between 0 and 1)",
        lambda run: run.args.draws_samples,
    ),
    (
        "temperature top_p top_k min_p repetition_penalty generation_kwargs rollout_steps rollout_overlap "
        "log_completions",
        "completions to train on (lmbda above 0, or seq_kd)",
        lambda run: run.args.generates,
    ),
    (
        "rollout_batch_size",
        "rollouts by transformers (no use_vllm)",
        lambda run: (run.builds_rollouts and not run.args.use_vllm) or run.args.seq_kd,
    ),
    ("num_completions_to_print", "log_completions=True", lambda run: run.args.log_completions),
    (
        "divergence divergence_options",
        "a teacher_vocabulary_mode other than 'uld'",
        lambda run: run.args.teacher_vocabulary_mode != "uld",
    ),
    ("beta", "divergence='jsd', and not teacher_vocabulary_mode='uld'", _is_jsd),
    ("divergence_scale", "divergence='jsd' and beta inside (0, 1)", lambda run: _is_jsd(run) and 0 < run.args.beta < 1),
    (
        "teacher_tail",
        "a teacher that gives only its top tokens (teacher_top_k)",
        lambda run: run.has_top_tokens is not False,
    ),
    ("teacher_weights", "teachers", lambda run: run.args.teachers is not None),
    ("teacher_offload", "a teacher in this process with weights of its own", _has_own_weights),
    (
        "teacher_column",
        "one of several teachers for each row (teachers without teacher_weights)",
        lambda run: run.args.teachers is not None and run.args.teacher_weights is None,
    ),
    (
        "teacher_server_model teacher_server_api_token teacher_server_checks",
        "teacher_server_base_url",
        _has_teacher_server,
    ),
    (
        "teacher_min_matched_mass",
        "teacher_vocabulary_mode='matched' and a teacher's full distributions",
        lambda run: run.args.teacher_vocabulary_mode == "matched" and not run.has_top_tokens,
    ),
    (
        "teacher_tokenizer_name_or_path",
        "a teacher_vocabulary_mode other than 'same'",
        lambda run: run.args.teacher_vocabulary_mode != "same",
    ),
    ("teacher_cache_miss", "teacher_cache_dir", lambda run: run.args.teacher_cache_dir is not None),
    (
        "teacher_server_dtype",
        "teacher_server_signal='hidden_states'",
        lambda run: run.args.teacher_server_signal == "hidden_states",
    ),
    ("self_teacher_ema_decay", "self_teacher='ema'", lambda run: run.args.self_teacher == "ema"),
    (
        "use_vllm",
        "completions (lmbda above 0, eval_on_policy, or an eval_dataset of prompts), and the trainer to build its "
        "rollouts (none passed)",
        lambda run: run.builds_rollouts and (run.args.generates_anywhere or run.has_eval_rows is not False),
    ),
    ("vllm_mode vllm_weight_sync", "use_vllm=True", _uses_vllm),
    (
        "vllm_server_timeout vllm_request_timeout",
        "servers (vllm_mode='server' or teacher_server_base_url)",
        lambda run: _uses_vllm_server(run) or _has_teacher_server(run),
    ),
    ("vllm_server_api_token", "use_vllm=True and vllm_mode='server'", _uses_vllm_server),
    (
        "vllm_sync_dir",
        "use_vllm=True, vllm_mode='server' and a vllm_weight_sync other than 'nccl'",
        lambda run: _uses_vllm_server(run) and run.args.vllm_weight_sync != "nccl",
    ),
    (
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size vllm_enable_sleep_mode "
        "vllm_engine_kwargs",
        "use_vllm=True and vllm_mode='colocate'",
        lambda run: _uses_vllm(run) and not run.args.uses_vllm_server,
    ),
    ("model_init_kwargs", "a student given by name", lambda run: run.loads_student),
)
"""Options that only some runs use, what they need, and whether a run has it. All other options always have an effect,
are refused without one, or depend on the data."""

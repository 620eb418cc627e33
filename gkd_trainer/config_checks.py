"""Parse the options, and check them one by one and in combination; raise GKDConfigError for all that is invalid.

`config_effects` says which options have no effect in a run. `args` is any GKDArguments.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from math import inf
from numbers import Integral, Real
from typing import Any, get_args

from transformers import GenerationConfig

from gkd_trainer.compat import DEFAULT_LOSSES
from gkd_trainer.config_effects import Run, unused_options
from gkd_trainer.divergence.options import check_choice, check_mode, check_top_k_temperature, checked_objective
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import redacted, redacted_source
from gkd_trainer.types import Sampling
from gkd_trainer.urls import ServerURL

REFUSED_UNUSED = ("ce_weight", "seq_kd")
"""Options that are refused if they have no effect: the run would not train on what was asked for. The trainer only
warns about the others, since sweeps often leave them set."""

# What generation_kwargs may not hold, and what to do instead.
_REFUSED_GENERATION_KWARGS = {
    **{
        option.name: f"set {option.name} itself, outside generation_kwargs"
        for option in dataclasses.fields(Sampling)
        if option.name != "extra"
    },
    **dict.fromkeys(("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"), "set top_p, top_k or min_p instead"),
    **dict.fromkeys(("max_length", "max_time"), "set max_new_tokens instead"),
    "min_length": "set min_new_tokens instead, which does not count padding",
    "do_sample": "completions are always sampled; set top_k=1 to take the most probable token",
    **dict.fromkeys(
        ("num_beams", "num_return_sequences", "num_beam_groups", "prompt_lookup_num_tokens", "is_assistant", "use_mtp"),
        "leave it out: each prompt gets one completion, sampled token by token",
    ),
    **dict.fromkeys(
        ("eos_token_id", "stop_strings"),
        "set eos_token_id in the model's generation_config or the tokenizer instead: completions end at any of them",
    ),
    "pad_token_id": "set it in the tokenizer instead",
    "decoder_start_token_id": "set it in the config of the encoder-decoder instead, which also shifts its labels by it",
    "token_healing": "leave it out: the prompt's tokens stay as they are",
    "use_cache": "leave it out: the cache is always on",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "leave it out: only token ids are read",
    ),
}

# Fields of vLLM's SamplingParams without an option of their own, and not fixed by the rollouts.
_VLLM_GENERATION_KWARGS = frozenset({"presence_penalty", "frequency_penalty", "min_tokens", "logit_bias"})
# Those for which transformers has no option.
_ONLY_IN_VLLM = frozenset({"presence_penalty", "frequency_penalty"})

_VLLM_MAX_TEMPERATURE = 2.0

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
        _check(name, repr(redacted(value, name)), is_valid, " or ".join(words for _, words in expected))


def check_ranges(args: Any, options: Iterable[dataclasses.Field[Any]]) -> None:
    """Raise GKDConfigError for the first number out of range, or value not among the choices in `options`."""
    in_unit = "in [0, 1]"
    _check("lmbda", args.lmbda, 0 <= args.lmbda <= 1, f"{in_unit} (0 is all data, 1 is all student)")
    if args.lmbda_end is not None:
        _check("lmbda_end", args.lmbda_end, 0 <= args.lmbda_end <= 1, in_unit)
    _check("teacher_min_matched_mass", args.teacher_min_matched_mass, 0 <= args.teacher_min_matched_mass <= 1, in_unit)
    _check("ce_weight", args.ce_weight, 0 <= args.ce_weight <= 1, in_unit)
    decay = args.self_teacher_ema_decay
    _check("self_teacher_ema_decay", decay, 0 <= decay < 1, "in [0, 1) (0 is the student's last step)")
    finite = "above 0 and finite"
    _check("temperature", args.temperature, 0 < args.temperature < inf, f"{finite} (1 samples the student as it is)")
    _check("top_p", args.top_p, 0 < args.top_p <= 1, "in (0, 1] (1 keeps every token)")
    _check("top_k", args.top_k, args.top_k >= 0, "0 (keeps every token) or more")
    if args.min_p is not None:
        _check("min_p", args.min_p, 0 <= args.min_p <= 1, in_unit)
    _check("repetition_penalty", args.repetition_penalty, 0 < args.repetition_penalty < inf, f"{finite} (1 is none)")
    if args.loss_workspace_mb is not None:
        _check("loss_workspace_mb", args.loss_workspace_mb, 1 <= args.loss_workspace_mb < inf, "at least 1")
    for name in ("vllm_server_timeout", "vllm_request_timeout"):
        _check(name, getattr(args, name), 0 < getattr(args, name) < inf, finite)
    _check(
        "vllm_gpu_memory_utilization",
        args.vllm_gpu_memory_utilization,
        0 < args.vllm_gpu_memory_utilization <= 1,
        "in (0, 1]",
    )
    _check("report_samples", args.report_samples, args.report_samples >= 0, "0 (keeps nothing) or more")
    for name in _COUNTS:
        value = getattr(args, name)
        _check(name, value, value is None or value >= 1, "at least 1")
    if args.max_length is not None:
        _check("max_length", args.max_length, args.max_length >= 2, "at least 2 (a prompt and a completion)")
    for option in options:
        choices = option.metadata.get("choices")
        if choices is not None:
            check_choice(option.name, redacted(getattr(args, option.name)), choices)


def check_combinations(run: Run) -> None:
    """Raise GKDConfigError for options that have no meaning together, as far as the run is known."""
    args = run.args
    checked_objective(
        args.divergence,
        args.divergence_options,
        beta=args.beta,
        temperature=args.loss_temperature,
        scale=args.divergence_scale,
        temperature_name="loss_temperature",
    )
    for name, need in unused_options(run):
        if name in REFUSED_UNUSED:
            raise GKDConfigError(
                f"{name}={getattr(args, name)} has no effect, since it needs {need}: lower lmbda (or an end of its "
                f"schedule), or leave {name} out"
            )
    _check_schedule(args)
    check_room_for_prompts(args)
    if args.use_vllm:
        _check_vllm_sampling(args)
    else:
        _check_generation_config(args.generation_kwargs or {})
    _check_servers(args)
    _check_several_teachers(args)
    _check_self_teacher(args)
    check_loss_temperature(run)
    _check_other_vocabulary(args)
    check_cache(run)
    _check_sft_options(args)


def check_room_for_prompts(args: Any) -> None:
    """Raise GKDConfigError if completions leave no room for their prompts in max_length."""
    if args.generates_anywhere and args.max_length is not None and args.max_length <= args.max_new_tokens:
        raise GKDConfigError(
            f"max_length ({args.max_length}) must exceed max_new_tokens ({args.max_new_tokens}), or no prompt "
            "fits: raise max_length or lower max_new_tokens"
        )


def check_loss_temperature(run: Run) -> None:
    """Raise GKDConfigError for a loss_temperature other than 1 and a teacher that gives only its top tokens.

    A configuration shows such a teacher by its servers or by teacher_top_k; the trainer knows of others.
    """
    args = run.args
    sends_top_tokens = args.teacher_server_base_url and args.teacher_server_signal == "top_k"
    has_top_tokens = run.has_top_tokens or sends_top_tokens or args.teacher_top_k is not None
    if has_top_tokens:
        check_top_k_temperature(args.loss_temperature, "loss_temperature")


def check_teacher_weights(weights: Mapping[str, Any], names: Collection[str], option: str) -> None:
    """Raise GKDConfigError unless each teacher of `names`, and no other, has a positive and finite weight."""
    if set(weights) != set(names):
        raise GKDConfigError(
            f"{option} must have a weight for each of the teachers {', '.join(names)}; got {', '.join(weights)}"
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        expected = "positive and finite (leave a teacher out to give it no weight)"
        _check(f"{option} of {name}", repr(weight), is_number and 0 < weight < inf, expected)


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


def _check_schedule(args: Any) -> None:
    if args.lmbda_schedule == "linear" and args.lmbda_end is None:
        raise GKDConfigError("lmbda_schedule='linear' needs lmbda_end, the λ of the last step; got None")
    if args.lmbda_schedule == "constant" and args.lmbda_end not in (None, args.lmbda):
        raise GKDConfigError(
            f"lmbda_end={args.lmbda_end} has no effect under lmbda_schedule='constant': "
            "set lmbda_schedule='linear', or leave lmbda_end out"
        )


def _check_servers(args: Any) -> None:
    if args.uses_vllm_server and not args.vllm_server_base_url:
        raise GKDConfigError(
            "vllm_mode='server' needs vllm_server_base_url, where your vLLM servers listen, such as "
            "http://127.0.0.1:8000; got None (docs/vllm.md says how to start one)"
        )
    if args.vllm_server_base_url and not args.uses_vllm_server:
        raise GKDConfigError(
            "vllm_server_base_url has no effect without use_vllm=True and vllm_mode='server': set them, or leave it out"
        )
    if None not in (args.vllm_max_model_length, args.max_length) and args.vllm_max_model_length < args.max_length:
        raise GKDConfigError(
            f"vllm_max_model_length ({args.vllm_max_model_length}) must be at least max_length "
            f"({args.max_length}), the longest prompt with its completion: raise vllm_max_model_length, lower "
            "max_length, or leave vllm_max_model_length out"
        )
    if args.rollout_overlap and not args.uses_vllm_server:
        raise GKDConfigError(
            "rollout_overlap=True generates while the student trains, which needs another process: set "
            "use_vllm=True and vllm_mode='server', or leave it out"
        )
    if args.vllm_weight_sync == "nccl" and not args.uses_vllm_server:
        raise GKDConfigError("vllm_weight_sync='nccl' sends weights to a server: set vllm_mode='server', or use 'full'")
    _check_teacher_servers(args)


def _check_teacher_servers(args: Any) -> None:
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
            "gives the whole distribution: leave it out, or set teacher_server_signal='top_k'"
        )


def _check_several_teachers(args: Any) -> None:
    if args.teachers is None:
        return
    is_valid = bool(args.teachers) and all(isinstance(path, str) and path for path in args.teachers.values())
    expected = "names of models or folders by a name of your own, at least one; pass other teachers as an object"
    _check("teachers", repr(redacted(args.teachers)), is_valid and all(args.teachers), expected)
    for name in ("teacher_model_name_or_path", "teacher_server_base_url"):
        if getattr(args, name) is not None:
            raise GKDConfigError(f"got both teachers and {name}: set one of them")
    if args.teacher_weights is not None:
        check_teacher_weights(args.teacher_weights, args.teachers, "teacher_weights")


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
            f"teacher_vocabulary_mode={mode!r} needs the teacher's whole distributions: set it to 'matched', or use a "
            "teacher in this process without teacher_top_k"
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


def _check_vllm_sampling(args: Any) -> None:
    if args.temperature > _VLLM_MAX_TEMPERATURE:
        raise GKDConfigError(
            f"temperature must be at most {_VLLM_MAX_TEMPERATURE} under use_vllm; got {args.temperature}"
        )
    generation_kwargs = args.generation_kwargs or {}
    for name in generation_kwargs:
        if name not in _VLLM_GENERATION_KWARGS:
            raise GKDConfigError(
                f"generation_kwargs can't hold {name!r} under use_vllm: it takes "
                f"{', '.join(sorted(_VLLM_GENERATION_KWARGS))}; vLLM's other sampling parameters have options of "
                "their own"
            )
        if args.seq_kd and name in _ONLY_IN_VLLM and generation_kwargs[name] != 0:
            raise GKDConfigError(
                f"generation_kwargs holds {name!r}, which only vLLM has, but under seq_kd=True the teacher "
                "generates with transformers: set repetition_penalty instead, or seq_kd=False"
            )
    biases = generation_kwargs.get("logit_bias")
    is_valid = biases is None or (
        isinstance(biases, dict)
        and all(str(key).isdecimal() and isinstance(bias, Real) for key, bias in biases.items())
    )
    _check("logit_bias in generation_kwargs", repr(biases), is_valid, "a dictionary of token ids and numbers")


def _check_generation_config(generation_kwargs: dict[str, Any]) -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in generation_kwargs:
        if name in _REFUSED_GENERATION_KWARGS:
            raise GKDConfigError(f"generation_kwargs can't hold {name!r}: {_REFUSED_GENERATION_KWARGS[name]}")
        if name not in known:
            raise GKDConfigError(
                f"generation_kwargs holds {name!r}, which is not an option of transformers.GenerationConfig: "
                "correct its name or leave it out"
            )
    try:
        GenerationConfig(**generation_kwargs)
    except (TypeError, ValueError) as error:
        raise GKDConfigError(f"transformers.GenerationConfig does not take generation_kwargs: {error}") from error


def _check_sft_options(args: Any) -> None:
    """Check the options of trl.SFTConfig, which `args` may or may not have."""
    packs = getattr(args, "packing", False) or getattr(args, "eval_packing", False)
    for name in ("packing", "padding_free", "eval_packing"):
        if args.generates_anywhere and getattr(args, name, False):
            raise GKDConfigError(
                f"{name}=True joins samples into one sequence, from which no completion can be sampled: "
                f"set {name}=False, or lmbda=0, seq_kd=False and eval_on_policy=False"
            )
    if packs and args.max_length is None:
        raise GKDConfigError("packing fills sequences up to max_length, which is None: set max_length")
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type not in DEFAULT_LOSSES:
        raise GKDConfigError(
            f"loss_type={loss_type!r} picks a loss of trl.SFTTrainer, but the loss here is the divergence from the "
            "teacher: leave it out (divergence, beta and ce_weight choose the loss)"
        )
    if getattr(args, "completion_only_loss", None) is False:
        raise GKDConfigError(
            "completion_only_loss=False would compare the models on prompts: leave it out, or give rows of `text`, "
            "all of which is trained on"
        )


def parsed_urls(name: str, value: list[str] | str | None) -> list[str] | None:
    """Return URLs as a list; the command line passes them as one string."""
    # Only before a scheme: a password may contain a comma.
    urls = re.split(r"\s*,\s*(?=https?://)", value.strip()) if isinstance(value, str) else value
    is_list = urls is None or (isinstance(urls, list) and bool(urls) and all(isinstance(url, str) for url in urls))
    _check(name, repr(value), is_list, "URLs such as http://127.0.0.1:8000, as a list or separated by commas")
    return None if urls is None else [ServerURL(url, name) for url in urls]


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


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise GKDConfigError(f"{name} must be {expected}; got {redacted(str(value))}")

"""Check the options in combination; raise GKDConfigError for those that have no meaning together.

`config_values` checks them one by one, `teacher_checks` those of the teacher.

`config_effects` says which options have no effect in a run. `args` is any GKDArguments.
"""

from __future__ import annotations

import dataclasses
from numbers import Real
from typing import Any

from transformers import GenerationConfig

from gkd_trainer.compat import DEFAULT_LOSSES
from gkd_trainer.config_effects import Run, unused_options
from gkd_trainer.config_values import check
from gkd_trainer.divergence.options import checked_objective
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.teacher_checks import check_teacher
from gkd_trainer.types import Sampling

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
    "watermarking_config": "leave it out: transformers would apply it to a token that is already drawn",
    "token_healing": "leave it out: the prompt's tokens stay as they are",
    "use_cache": "leave it out: the cache is always on",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "leave it out: only token ids are read",
    ),
}

# Fields of vLLM's SamplingParams without an option of their own, and not fixed by the rollouts.
_VLLM_GENERATION_KWARGS = frozenset({"presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "logprobs"})
# Those for which transformers has no option.
_ONLY_IN_VLLM = frozenset({"presence_penalty", "frequency_penalty"})

_VLLM_MAX_TEMPERATURE = 2.0


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
    check_teacher(run)
    _check_sft_options(args)


def check_room_for_prompts(args: Any) -> None:
    """Raise GKDConfigError if completions leave no room for their prompts in max_length."""
    if args.generates_anywhere and args.max_length is not None and args.max_length <= args.max_new_tokens:
        raise GKDConfigError(
            f"max_length ({args.max_length}) must exceed max_new_tokens ({args.max_new_tokens}), or no prompt "
            "fits: raise max_length or lower max_new_tokens"
        )


def check_dataset_kwargs(dataset_kwargs: Any) -> None:
    """Raise GKDConfigError for keys of dataset_kwargs that only another trainer could read."""
    unknown = sorted(map(repr, (dataset_kwargs or {}).keys() - {"skip_prepare_dataset"}))
    if unknown:
        raise GKDConfigError(f"dataset_kwargs takes only 'skip_prepare_dataset'; got {', '.join(unknown)}")


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
    if generation_kwargs.get("logprobs") is not None:
        raise GKDConfigError(
            f"generation_kwargs holds logprobs={generation_kwargs['logprobs']!r}: it must be None, which trains "
            "without comparing the engine's log-probabilities with the student's, or be left out"
        )
    biases = generation_kwargs.get("logit_bias")
    is_valid = biases is None or (
        isinstance(biases, dict)
        and all(str(key).isdecimal() and isinstance(bias, Real) for key, bias in biases.items())
    )
    check("logit_bias in generation_kwargs", repr(biases), is_valid, "a dictionary of token ids and numbers")


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
    if getattr(args, "truncation_mode", "keep_start") != "keep_start":
        raise GKDConfigError(
            f"truncation_mode={args.truncation_mode!r} would cut the prompts, but here rows are cut at the end, and "
            "prompts that leave no room are dropped: leave it out, or shorten the prompts before"
        )
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

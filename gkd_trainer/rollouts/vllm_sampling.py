"""The request of both vLLM engines: it sets every sampling field, so no default of a model or server applies."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.types import Completion, Sampling

_NEVER = -100.0
"""The logit bias of tokens that must not be sampled: vLLM's lowest, which scales their probability by e⁻¹⁰⁰."""


_MAX_BIASES = 1024
"""The most that a request may have in vLLM's model runner V2, its default on GPUs (MAX_NUM_LOGIT_BIAS_TOKENS in its
vllm/v1/worker/gpu/sample/logit_bias.py). More end the engine."""


ASKED_PROMPTS = 8
"""How many prompts of a call are asked for the log-probabilities of their tokens: enough to compare them with the
student's. vLLM takes some 10 µs per token to tell it, which for all prompts of a large call would be noticed. (Its
model runner V1 also computes the log-probabilities of the whole batch in each step in which one prompt is asked.)"""


def sampling_fields(sampling: Sampling, stop_ids: Sequence[int], never_ids: Collection[int]) -> dict[str, Any]:
    """Return the fields of vLLM's SamplingParams; its completions endpoint takes them under the same names.

    Args:
        sampling: How tokens are drawn; `extra` holds further fields of SamplingParams.
        stop_ids: A completion ends with the first of these tokens, which it includes.
        never_ids: Ids that are never sampled: those that only pad the head, or stand for an image.
    """
    fields: dict[str, Any] = {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "stop_token_ids": list(stop_ids),
        # vLLM's own end of sequence would also stop it; all stop ids are listed above.
        "ignore_eos": True,
        **sampling.extra,
    }
    if never_ids:
        biases = {int(token_id): bias for token_id, bias in (fields.get("logit_bias") or {}).items()}
        fields["logit_bias"] = {**biases, **dict.fromkeys(never_ids, _NEVER)}
    return fields


def asking_for_log_probs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that also asks for the log-probability of each sampled token.

    Not if they hold `logprobs` already: a user's None declines. Nor if they draw nothing, as in evaluations, where
    nobody would read it.
    """
    return {"logprobs": 0, **fields} if fields["temperature"] > 0 else dict(fields)


def excess_of_biases(count: int) -> str | None:
    """Return what to do about more logit biases than vLLM's model runner V2 takes; None if they are not too many."""
    if count <= _MAX_BIASES:
        return None
    return (
        f"vLLM's model runner V2, its default on GPUs, takes at most {_MAX_BIASES} logit biases per request, but "
        f"{count} are needed: one for each row of the head that is no token or stands for an image, and those in "
        "generation_kwargs. Start vLLM with the environment variable VLLM_USE_V2_MODEL_RUNNER=0, cut the student's "
        "head to its tokens (resize_token_embeddings), or set use_vllm=False"
    )


def transformers_options(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of vLLM's SamplingParams under their names in transformers.GenerationConfig.

    Only `min_tokens` and `logit_bias` have such a name.
    """
    options: dict[str, Any] = {}
    if extra.get("min_tokens"):
        options["min_new_tokens"] = extra["min_tokens"]
    if extra.get("logit_bias"):
        options["sequence_bias"] = [[[int(token_id)], float(bias)] for token_id, bias in extra["logit_bias"].items()]
    return options


def parse_completion(
    token_ids: Sequence[int],
    finish_reason: str | None,
    sampling: Sampling,
    stop_ids: Sequence[int],
    vocab_size: int,
    log_probs: Sequence[float | None] | None = None,
) -> Completion:
    """Return vLLM's output as a Completion.

    Raises ValueError if it is too long or too short, cut off for another reason, or has unknown tokens.
    """
    ids = [int(token_id) for token_id in token_ids]
    is_finished = finish_reason == "stop"
    if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"expected token ids in [0, {vocab_size}), at least one; got {ids[:8]}")
    is_complete = ids[-1] in stop_ids if is_finished else len(ids) == sampling.max_new_tokens
    if finish_reason not in ("stop", "length") or len(ids) > sampling.max_new_tokens or not is_complete:
        raise ValueError(
            f"expected a completion that ends with one of the stop ids {list(stop_ids)} or after "
            f"{sampling.max_new_tokens} tokens; got {len(ids)} tokens up to {ids[-1]}, finish_reason {finish_reason!r}"
        )
    if log_probs is None:
        return Completion(ids, is_finished)
    values = [math.nan if value is None else float(value) for value in log_probs]
    if len(values) != len(ids) or any(map(math.isinf, values)):
        raise ValueError(f"expected {len(ids)} finite log-probs, one per token; got {len(values)}: {values[:8]}")
    return Completion(ids, is_finished, log_probs=values)


def check_lengths(prompts: Sequence[Sequence[int]], sampling: Sampling, max_model_length: int) -> None:
    """Raise GKDConfigError if a prompt and its completion would not fit the engine."""
    longest = max(map(len, prompts), default=0)
    if longest + sampling.max_new_tokens > max_model_length:
        raise GKDConfigError(
            f"the engine takes at most {max_model_length} tokens, but a prompt of {longest} and "
            f"max_new_tokens={sampling.max_new_tokens} make {longest + sampling.max_new_tokens}: raise "
            "vllm_max_model_length (--max-model-len of a server), or lower max_length"
        )

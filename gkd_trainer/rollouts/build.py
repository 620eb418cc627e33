"""Build rollout engines from options: the student's, and under `seq_kd` the teacher's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.decoders import has_fixed_start, is_encoder_decoder, start_token_id
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.weights import refuse_quantised
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.hf import HFRollouts
from gkd_trainer.rollouts.vllm_colocate import VLLMColocateRollouts
from gkd_trainer.rollouts.vllm_server import VLLMServerRollouts


def find_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Return every id that ends a completion: the eos ids of the model's generation config, and the tokenizer's."""
    return stop_ids_of(getattr(model, "generation_config", None), tokenizer)


def stop_ids_of(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return every id that ends a completion: the eos ids of a generation config, and the tokenizer's."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def sampled_vocabulary_size(shared_size: int, vocabulary: Mapping[str, int] | None) -> int:
    """Return the number of token ids that may be sampled.

    Args:
        shared_size: The number of tokens over which student and teacher are compared, which may include padding.
        vocabulary: The id of each token of the student's tokenizer; None if unknown.
    """
    return shared_size if vocabulary is None else min(shared_size, max(vocabulary.values()) + 1)


def refuse_engine(engine: RolloutEngine | None, args: GKDArguments, student: nn.Module, *, is_sharded: bool) -> None:
    """Raise GKDConfigError if an encoder-decoder can't generate with an engine, passed or None to be built.

    Args:
        engine: The engine, if one was passed.
        args: The options.
        student: The student, or the PEFT model around it.
        is_sharded: Whether the student's weights are sharded over ranks.
    """
    student = base_model(student)
    if not is_encoder_decoder(student):
        return
    name = type(student).__name__
    if isinstance(engine, VLLMColocateRollouts | VLLMServerRollouts) or (engine is None and args.use_vllm):
        raise GKDConfigError(
            f"{name} is an encoder-decoder, and vLLM only generates with causal LMs here: set use_vllm=False, so that "
            "transformers generates"
        )
    if engine is None and is_sharded and args.generates_anywhere:
        raise GKDConfigError(
            f"{name} is an encoder-decoder whose weights are sharded over ranks (FSDP or ZeRO-3): generate calls its "
            "encoder by itself, whose weights would not be gathered. Generate nothing (lmbda=0, seq_kd=False, "
            "eval_on_policy=False), or use DDP"
        )
    if not args.generates_anywhere:
        return
    if not has_fixed_start(student):
        raise GKDConfigError(
            f"{name} puts the last label of a sample before the first, so the start token of a completion is unknown "
            "until it is generated: generate nothing (lmbda=0, seq_kd=False, eval_on_policy=False)"
        )
    own_start = getattr(getattr(student, "generation_config", None), "decoder_start_token_id", None)
    if own_start is not None and own_start != start_token_id(student):
        raise GKDConfigError(
            f"{name} starts to generate with token {own_start} (decoder_start_token_id in its generation_config), but "
            f"trains its labels after token {start_token_id(student)}: set decoder_start_token_id to the same in its "
            "config and generation_config, or generate nothing (lmbda=0, seq_kd=False, eval_on_policy=False)"
        )


def build_student_engine(
    args: GKDArguments,
    student: nn.Module,
    *,
    stop_ids: Sequence[int],
    pad_token_id: int,
    vocab_size: int,
    never_sampled: Collection[int] = (),
    may_generate: bool = True,
    rank: int = 0,
    is_sharded: bool = False,
    fsdp_version: int | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> RolloutEngine:
    """Return the engine that the options ask for; it has no weights before its first `sync`.

    Args:
        args: The options.
        student: The student, or the PEFT model around it.
        stop_ids: A completion ends with the first of these tokens.
        pad_token_id: Pads the prompts of a batch.
        vocab_size: Number of token ids that may be sampled (see `sampled_vocabulary_size`).
        never_sampled: Token ids below it that are never sampled, such as that of an image.
        may_generate: Whether any completion may be generated; if not, vLLM's engine would only take memory.
        rank: The rank of this process.
        is_sharded: Whether the student's weights are sharded over ranks.
        fsdp_version: 1 or 2 under FSDP, else None.
        dtype: Dtype of an engine in this process, to match autocast in training; None for the student's.
        trust_remote_code: Whether an engine in this process may run Python code that comes with the model.

    Raises:
        GKDConfigError: The student can't generate, its weights can't be sent to vLLM (FSDP 1 hides them, or they are
            quantised), or the engine refuses an option.
        GKDServerError: A server can't be reached.
    """
    if not (args.use_vllm and may_generate):
        _require_generate(args, base_model(student))
        return HFRollouts(stop_ids, pad_token_id, vocab_size, args.rollout_batch_size, is_sharded, never_sampled)
    if fsdp_version == 1:
        raise GKDConfigError(
            "use_vllm=True takes weights one by one, but FSDP 1 stores them flattened together: set fsdp_version: 2"
        )
    if args.vllm_mode == "server":
        assert args.vllm_server_base_url is not None  # the options are checked
        if args.vllm_weight_sync != "adapter":
            refuse_quantised(student)
        return VLLMServerRollouts(
            args.vllm_server_base_url,
            stop_ids,
            vocab_size,
            never_sampled=never_sampled,
            api_token=args.vllm_server_api_token,
            server_timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
            weight_sync=args.vllm_weight_sync,
            sync_dir=args.vllm_sync_dir,
            max_length=args.max_length,
            rank=rank,
        )
    return VLLMColocateRollouts(
        student,
        stop_ids,
        vocab_size,
        never_sampled=never_sampled,
        dtype=dtype,
        max_model_length=args.vllm_max_model_length or args.max_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        # A sharded adapter would have to be gathered first, which is only done for the full weights.
        weight_sync="full" if args.vllm_weight_sync == "auto" and is_sharded else args.vllm_weight_sync,
        trust_remote_code=trust_remote_code,
        engine_kwargs=cast("dict[str, Any] | None", args.vllm_engine_kwargs),  # JSON is parsed already
    )


def build_teacher_engine(
    args: GKDArguments,
    teacher: nn.Module,
    *,
    stop_ids: Sequence[int],
    pad_token_id: int,
    vocab_size: int,
    never_sampled: Collection[int] = (),
) -> RolloutEngine:
    """Return an engine that completes prompts with a local teacher, ready to generate.

    Args:
        args: The options.
        teacher: The teacher's model.
        stop_ids: The student's stop ids, which end the teacher's completions in addition to its own.
        pad_token_id: Pads the prompts of a batch.
        vocab_size: Number of token ids that may be sampled.
        never_sampled: Token ids below it that are never sampled.
    """
    model = base_model(teacher)
    engine = HFRollouts(
        [*stop_ids, *find_stop_ids(model)],
        pad_token_id,
        vocab_size,
        args.rollout_batch_size,
        never_sampled=never_sampled,
    )
    engine.sync(model)
    return engine


def _require_generate(args: GKDArguments, student: nn.Module) -> None:
    if args.generates_anywhere and not hasattr(student, "generate"):
        option = f"lmbda={args.lmbda}" if args.generates else "eval_on_policy=True"
        raise GKDConfigError(
            f"{option} makes the student generate, but {type(student).__name__} can't: "
            "use a causal LM of transformers, pass rollouts, or switch generation off"
        )

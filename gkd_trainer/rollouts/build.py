"""Options turned into rollout engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.loading import base_model
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.hf import HFRollouts
from gkd_trainer.rollouts.vllm_colocate import VLLMColocateRollouts
from gkd_trainer.rollouts.vllm_server import VLLMServerRollouts


def stop_ids_of(model: nn.Module, tokenizer: Any = None) -> list[int]:
    """Return every id at which a model's completions end: those of its generation config, and its tokenizer's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def build_student_engine(
    args: Any,
    model: nn.Module,
    *,
    stop_ids: list[int],
    pad_token_id: int,
    vocab_size: int,
    sharding: str | None,
    rank: int,
) -> RolloutEngine:
    student = base_model(model)
    if args.generates_anywhere and not args.use_vllm and not hasattr(student, "generate"):
        option = f"lmbda={args.lmbda}" if args.generates else "eval_on_policy=True"
        raise GKDConfigError(
            f"{option} has the student generate, which {type(student).__name__} can't: "
            "use a causal LM of transformers, pass rollouts, or switch generation off"
        )
    if not args.use_vllm:
        return HFRollouts(stop_ids, pad_token_id, vocab_size, args.rollout_batch_size, sharding is not None)
    if sharding == "fsdp1":
        raise GKDConfigError(
            "use_vllm=True takes the weights one by one, which FSDP version 1 keeps in flat blocks: set fsdp_version: 2"
        )
    if args.vllm_mode == "server":
        return VLLMServerRollouts(
            args.vllm_server_base_url,
            stop_ids,
            vocab_size,
            api_token=args.vllm_server_api_token,
            server_timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
            weight_sync=args.vllm_weight_sync,
            sync_dir=args.vllm_sync_dir,
            max_length=args.max_length,
            rank=rank,
        )
    return VLLMColocateRollouts(
        model,
        stop_ids,
        vocab_size,
        # The numerics that the loss sees.
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        max_model_length=args.vllm_max_model_length or args.max_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        # An adapter that is sharded would have to be gathered first, as the full weights are.
        weight_sync="full" if args.vllm_weight_sync == "auto" and sharding else args.vllm_weight_sync,
        trust_remote_code=getattr(args, "trust_remote_code", False),
        engine_kwargs=args.vllm_engine_kwargs,
    )


def build_teacher_engine(
    args: Any, teacher: nn.Module, *, stop_ids: list[int], pad_token_id: int, vocab_size: int
) -> HFRollouts:
    teacher = base_model(teacher)
    stop_ids = sorted({*stop_ids, *stop_ids_of(teacher)})
    engine = HFRollouts(stop_ids, pad_token_id, vocab_size, args.rollout_batch_size, False)
    engine.sync(teacher)
    return engine

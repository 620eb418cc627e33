"""Generation as subclasses of TRL's GKDTrainer call it.

Shapes: B batch, P prompt width, L prompt and completion together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.compat import checkpoints_activations


def generate_on_policy_outputs(
    model: Any, inputs: Mapping[str, Tensor], generation_config: GenerationConfig, pad_token_id: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, attention mask and labels [B, L] of prompts with completions by `model.generate`.

    Labels mask the prompts and everything after a completion's first stop token. For subclasses of
    `trl.experimental.gkd.GKDTrainer`: the trainer here generates with its `rollouts`, with their own seeds.

    Args:
        model: A causal LM of transformers.
        inputs: `prompts` [B, P], padded on the left, and `prompt_attention_mask` [B, P], without which there is no
            padding.
        generation_config: How to generate, and the ids to stop at.
        pad_token_id: Not needed; earlier versions of TRL passed it.
    """
    del pad_token_id
    prompts_BP = inputs["prompts"]
    prompt_mask_BP = inputs.get("prompt_attention_mask")
    if prompt_mask_BP is None:
        prompt_mask_BP = torch.ones_like(prompts_BP)
    output = model.generate(input_ids=prompts_BP, attention_mask=prompt_mask_BP, generation_config=generation_config)
    ids_BL: Tensor = output if isinstance(output, Tensor) else output.sequences
    completions = ids_BL[:, prompts_BP.shape[1] :]
    stop_ids = generation_config.eos_token_id
    is_stop = torch.isin(completions, torch.as_tensor([] if stop_ids is None else stop_ids, device=ids_BL.device))
    # The first stop token belongs to the completion; everything after it does not.
    is_kept = is_stop.cumsum(dim=1) - is_stop.long() == 0
    mask_BL = torch.cat([prompt_mask_BP, is_kept], dim=1).long()
    labels_BL = torch.cat([torch.full_like(prompts_BP, IGNORE_INDEX), completions.where(is_kept, IGNORE_INDEX)], dim=1)
    return ids_BL, mask_BL, labels_BL


def trl_generation_config(args: Any, model: nn.Module, pad_token_id: int) -> GenerationConfig:
    """Return the sampling of `args` as transformers' GenerationConfig, with the stop ids of the model."""
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        use_cache=not checkpoints_activations(args),
        pad_token_id=pad_token_id,
        eos_token_id=getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        **({} if args.use_vllm else args.generation_kwargs or {}),
    )

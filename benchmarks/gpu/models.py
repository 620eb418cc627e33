"""Random models of Qwen2.5's shapes, made on the device: nothing is downloaded, and timing does not read the weights.

Shapes: B batch, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.gpu.cells import Where

SIZES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,  # more padding than the smaller models have
        "tie_word_embeddings": False,
    },
}
"""The shapes of Qwen2.5's models, from their configurations."""

TOKENS = 151665
"""How many tokens their tokenizer has, which both models are compared over; the rest of their heads is padding."""

_SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}


def random_model(where: Where, size: str, dtype: torch.dtype) -> nn.Module:
    """Return a causal LM of one of SIZES, or a tiny one with the same relations between widths and vocabularies."""
    shape = SIZES[size]
    if where.is_small:
        small = {"hidden_size": shape["hidden_size"] // 56, "vocab_size": shape["vocab_size"] // 400}
        shape = {**shape, **_SMALL, **small}
    config = Qwen2Config(**shape, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with torch.device(where.torch_device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def vocabulary_size(where: Where) -> int:
    """Return how many tokens the tokenizer has."""
    return int(where.pick(TOKENS, TOKENS // 401))


def random_rows(where: Where, B: int, L: int, prompt: int) -> dict[str, Tensor]:
    """Return a batch of random tokens, of which all but the first `prompt` of each sample are trained on."""
    ids_BL = torch.randint(2, vocabulary_size(where), (B, L), generator=torch.Generator().manual_seed(0))
    labels_BL = ids_BL.clone()
    labels_BL[:, :prompt] = -100
    batch = {"input_ids": ids_BL, "labels": labels_BL, "attention_mask": torch.ones_like(ids_BL)}
    return {name: values_BL.to(where.torch_device) for name, values_BL in batch.items()}


def tokenizer(where: Where) -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many tokens as Qwen2.5's, for trainers that ask for one."""
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<end>": 1} | {str(token_id): token_id for token_id in range(2, vocabulary_size(where))}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>", pad_token="<end>")

"""Prompts as the inputs of transformers' `generate`: before the new tokens, or in an encoder.

Shapes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.models.decoders import is_encoder_decoder, start_token_id


@dataclass(frozen=True)
class PromptBatch:
    """Padded prompts, and what `generate` returns before the new tokens.

    `mask_BL` is 1 for a prompt's tokens. `start_id` is the token that an encoder-decoder's new tokens follow; None for
    a causal LM, whose new tokens follow the prompts.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    start_id: int | None

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Sequence[int]], padding_id: int) -> PromptBatch:
        """Pad prompts on the left for a causal LM, whose new tokens must follow, and on the right for an encoder."""
        start_id = start_token_id(model) if is_encoder_decoder(model) else None
        length = max(map(len, prompts))
        ids_BL = torch.full((len(prompts), length), padding_id, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            first = 0 if start_id is not None else length - len(prompt)
            ids_BL[row, first : first + len(prompt)] = torch.tensor(prompt)
            mask_BL[row, first : first + len(prompt)] = 1
        return cls(ids_BL.to(model.device), mask_BL.to(model.device), start_id)

    @property
    def n_given(self) -> int:
        """How many tokens precede the new ones in the output of `generate`."""
        return self.given_mask_BL.shape[1]

    @property
    def given_mask_BL(self) -> Tensor:
        """Which of those tokens belong to a prompt; a decoder's start token does not."""
        return self.mask_BL if self.start_id is None else torch.zeros_like(self.mask_BL[:, :1])

    @property
    def config_options(self) -> dict[str, int]:
        """The options of GenerationConfig that start a decoder."""
        return {} if self.start_id is None else {"decoder_start_token_id": self.start_id}

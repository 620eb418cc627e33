"""Move the padding of a collated batch behind each row's tokens, and values per token back.

Shapes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.batch_keys import PER_LABEL, PER_TOKEN, has_decoder_inputs, may_be_per_token


def right_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a collated batch with each row's padding, by its `attention_mask` [B, L], moved after the row's tokens.

    Padding before the tokens changes the logits of a model that counts positions by column or carries a state from
    token to token, and lets a padding position predict the first token. No causal model sees padding after them.
    PER_TOKEN values move along. A batch with a tensor that `may_be_per_token` is left as it is: the tensor's values
    would no longer match their tokens. If the batch `has_decoder_inputs`, only the encoder's values move.
    """
    per_token = _names_per_token(inputs)
    column_BL = _columns_when_right_padded(inputs)
    if column_BL is None:
        return dict(inputs)
    row_B1 = _rows_B1(column_BL)

    def moved(name: str, value: Any) -> Any:
        if name not in per_token or not isinstance(value, Tensor):
            return value
        return value[..., row_B1, column_BL] if name == "position_ids" else value[row_B1, column_BL]

    return {name: moved(name, value) for name, value in inputs.items()}


def in_columns_of(inputs: Mapping[str, Any], values_BL: Tensor) -> Tensor:
    """Return values [B, L, ...] of the `right_padded` batch, moved back to the columns of their tokens in `inputs`.

    An encoder-decoder's values are per label, and stay: only its encoder's tokens were moved.
    """
    if has_decoder_inputs(inputs):
        return values_BL
    column_BL = _columns_when_right_padded(inputs)
    if column_BL is None or values_BL.shape[:2] != column_BL.shape or not column_BL[:, 0].any():
        return values_BL
    return values_BL[_rows_B1(column_BL), column_BL.argsort(dim=1)]


def _columns_when_right_padded(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return, for each column of the right-padded batch, its column in `inputs`; None if nothing moves."""
    mask_BL, labels_BL = inputs.get("attention_mask"), inputs.get("labels")
    if not isinstance(mask_BL, Tensor) or not isinstance(labels_BL, Tensor) or mask_BL.dim() != 2:
        return None
    per_token = _names_per_token(inputs)
    for name, value in inputs.items():
        if may_be_per_token(name, value):
            return None
        if name in per_token and isinstance(value, Tensor):
            shape = value.shape[-2:] if name == "position_ids" else value.shape[:2]
            if shape != mask_BL.shape:
                return None
    length = mask_BL.shape[1]
    first_B1 = (mask_BL != 0).int().argmax(dim=1, keepdim=True)  # 0 in a row of padding alone
    return (torch.arange(length, device=mask_BL.device) + first_B1) % length


def _names_per_token(inputs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the values per token of `input_ids`."""
    return PER_TOKEN - PER_LABEL if has_decoder_inputs(inputs) else PER_TOKEN


def _rows_B1(column_BL: Tensor) -> Tensor:
    return torch.arange(len(column_BL), device=column_BL.device)[:, None]

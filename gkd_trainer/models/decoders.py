"""The decoder of an encoder-decoder: its first token, and its inputs made from labels.

Shapes: B batch, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gkd_trainer.batch_keys import DECODER_INPUT_IDS, IGNORE_INDEX, PER_LABEL, has_decoder_inputs
from gkd_trainer.errors import GKDConfigError


def is_encoder_decoder(model: nn.Module | None) -> bool:
    """Return whether a model, not wrapped by PEFT or for distribution, is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def start_token_id(model: nn.Module) -> int:
    """Return the token that an encoder-decoder puts before its labels, to predict the first of them.

    Raises GKDConfigError if its config does not give one.
    """
    try:
        first = _shifted(model, torch.tensor([[_stand_in(model)]]))
    except (AttributeError, TypeError, ValueError) as error:
        raise GKDConfigError(
            f"the decoder of {type(model).__name__} has no first token: set decoder_start_token_id and pad_token_id in "
            f"its config ({error})"
        ) from error
    return int(first[0, 0])


def has_fixed_start(model: nn.Module) -> bool:
    """Return whether an encoder-decoder puts the same token before all labels; mBART puts the last label there."""
    known = (_stand_in(model), getattr(model.config, "pad_token_id", None))
    other = next(token_id for token_id in range(3) if token_id not in known)
    return int(_shifted(model, torch.tensor([[other]]))[0, 0]) == start_token_id(model)


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a collated batch with the decoder inputs that an encoder-decoder makes from labels; else as it is.

    Decoder inputs that the collator gave are kept. Padding before the labels, which a tokenizer that pads on the left
    leads DataCollatorForSeq2Seq to put there, is moved after them: the decoder would read it. With given decoder
    inputs, `decoder_attention_mask` decides what is padding; without that mask, inputs that equal the shifted labels
    are made again, and any others stay.
    """
    labels_BL = inputs.get("labels")
    if not is_encoder_decoder(model) or not isinstance(labels_BL, Tensor):
        return inputs
    if labels_BL.shape[1] == 0:  # only prompts
        labels_BL = labels_BL.new_full((len(labels_BL), 1), IGNORE_INDEX)
        inputs = {**{name: value for name, value in inputs.items() if name not in PER_LABEL}, "labels": labels_BL}
    mask_BL = inputs.get("decoder_attention_mask")
    is_made = not has_decoder_inputs(inputs)
    if not is_made and mask_BL is None:
        is_empty_B1 = (labels_BL == IGNORE_INDEX).all(dim=1, keepdim=True)
        is_shifted_BL = inputs[DECODER_INPUT_IDS] == _shifted(model, labels_BL)
        is_made = bool((is_shifted_BL | is_empty_B1).all())
        if not is_made:
            return inputs
    is_real_BL = labels_BL != IGNORE_INDEX if mask_BL is None else mask_BL != 0
    column_BL = _moved(is_real_BL, 1)
    moved = {name: inputs[name].gather(1, column_BL) for name in PER_LABEL if inputs.get(name) is not None}
    if is_made:
        moved[DECODER_INPUT_IDS] = _shifted(model, moved["labels"])
    return {**inputs, **moved}


def in_label_columns(inputs: Mapping[str, Any], values_BL: Tensor) -> Tensor:
    """Return values [B, L, ...] per label of `with_decoder_inputs`, moved to the columns of the labels in `inputs`.

    `inputs` are those before, without decoder inputs.
    """
    column_BL = _moved(inputs["labels"] != IGNORE_INDEX, -1)
    return values_BL[torch.arange(len(column_BL), device=column_BL.device)[:, None], column_BL]


def _moved(is_real_BL: Tensor, direction: int) -> Tensor:
    """Return, for each column, the one whose value it takes if rows move left by their leading padding (-1: back)."""
    length = is_real_BL.shape[1]
    first_B1 = is_real_BL.int().argmax(dim=1, keepdim=True)  # 0 in a row of padding alone
    return (torch.arange(length, device=is_real_BL.device) + direction * first_B1) % length


def _shifted(model: Any, labels_BL: Tensor) -> Tensor:
    # Without any label in a row, mBART would look in vain for the last one, which it puts first.
    is_empty_B = (labels_BL == IGNORE_INDEX).all(dim=1)
    filled_BL = labels_BL.clone()
    filled_BL[:, 0] = torch.where(is_empty_B, _stand_in(model), labels_BL[:, 0])
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        shifted_BL: Tensor = shift(labels=filled_BL)
        return shifted_BL
    config = model.config  # M2M100 only shifts inside its forward
    first_B1 = labels_BL.new_full((len(labels_BL), 1), config.decoder_start_token_id)
    filled_BL = filled_BL.masked_fill(filled_BL == IGNORE_INDEX, config.pad_token_id)
    return torch.cat([first_B1, filled_BL[:, :-1]], dim=1)


def _stand_in(model: Any) -> int:
    config = model.config.get_text_config()
    for token_id in (getattr(config, "eos_token_id", None), getattr(model.config, "decoder_start_token_id", None)):
        if token_id is not None:
            return int(token_id[0] if isinstance(token_id, list) else token_id)
    return 0

"""Which prompts may share a batch of a model: all, those of one length, or none.

Shapes: B batch, L length, T new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gkd_trainer.models.heads import vocabulary_size, without_router_logits

logger = logging.getLogger(__name__)

_SHORT_PROBE, _OTHER_PROBE, _LONG_PROBE = range(3), range(3, 6), range(6, 30)
_PROBE_PADDING, _PROBE_OTHER_PADDING = 30, 31
_PROBE_NEW_TOKENS = 3

_LEAST_TOLERANCE = 1e-3
"""The relative difference up to which logits count as equal in any dtype."""

_ROUNDING_SPREAD = 4
"""How many times larger the rounding between two shapes may be than between two others."""

_LARGEST_LOGIT = 1e4
"""A logit of a larger magnitude masks a token out: infinity, or the lowest number of a dtype."""


class Sharing(IntEnum):
    """Which prompts may share a batch."""

    ANY = 0
    EQUAL_LENGTH = 1
    NONE = 2


def find_sharing(model: Any, pad_token_id: int, is_sharded: bool) -> Sharing:
    """Return which prompts may share a batch of a model that is ready to generate, and log where not all may.

    That is tested on the logits of a few tokens, generated alone, beside another row, and behind padding. A model that
    can't be probed generates one completion after another.
    """
    probe = functools.partial(_probe, model, pad_token_id, is_sharded)
    name = type(model).__name__
    try:
        [short_TV], [long_TV] = probe(_SHORT_PROBE), probe(_LONG_PROBE)
        beside_TV, _ = probe(_SHORT_PROBE, _OTHER_PROBE)
        unpadded_TV, padded_TV = probe(_LONG_PROBE, _SHORT_PROBE)
        _, other_padding_TV = probe(_LONG_PROBE, _SHORT_PROBE, padding_id=_PROBE_OTHER_PADDING)
    except Exception as error:  # whatever an unknown model may raise
        logger.warning(
            "Whether %s can be batched can't be found out (%s: %s): it generates one completion after another, "
            "which takes longer.",
            name,
            type(error).__name__,
            error,
        )
        return Sharing.NONE
    tolerance = _tolerance(model, is_sharded)
    beside = [_difference(beside_TV, short_TV), _difference(unpadded_TV, long_TV)]
    if not all(difference <= tolerance for difference in beside):  # NaN is more than any tolerance
        logger.warning(
            "%s mixes the rows of a batch while it generates: it generates one completion after another, which "
            "takes longer.",
            name,
        )
        return Sharing.NONE
    rounding = max(beside)
    is_padding_hidden = (
        _difference(padded_TV, short_TV) <= max(_LEAST_TOLERANCE, _ROUNDING_SPREAD * rounding)
        # Both have the same shape, so they round alike.
        and _difference(other_padding_TV, padded_TV) <= max(_LEAST_TOLERANCE, rounding)
    )
    if not is_padding_hidden:
        logger.warning(
            "%s reads the padding of a batch in spite of its mask: it generates for prompts of one length after "
            "another, which takes longer.",
            name,
        )
        return Sharing.EQUAL_LENGTH
    return Sharing.ANY


def _probe(
    model: Any, pad_token_id: int, is_sharded: bool, *prompts: range, padding_id: int = _PROBE_PADDING
) -> Tensor:
    """Return the logits [B, T, V] of fixed tokens after a batch of prompts.

    Their padding is not the pad token, whose embedding may be zero.
    """
    length = max(map(len, prompts))
    ids_BL = torch.tensor([[padding_id] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=_PROBE_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = model.generate(
        input_ids=(ids_BL % vocabulary_size(model)).to(model.device),
        attention_mask=mask_BL.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([_FixedTokens(length)]),
        synced_gpus=is_sharded,
        **without_router_logits(model),
    )
    return torch.stack(output.logits, dim=1)


def _tolerance(model: Any, is_sharded: bool) -> float:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device_type = model.device.type
    if torch.is_autocast_enabled(device_type):
        dtypes.add(torch.get_autocast_dtype(device_type))
    if is_sharded:  # which may gather them in another dtype
        dtypes.add(torch.bfloat16)
    # A weight of 8 bits is stored, not computed with.
    return max([4 * torch.finfo(dtype).eps for dtype in dtypes if torch.finfo(dtype).bits >= 16] + [_LEAST_TOLERANCE])


def _difference(logits_TV: Tensor, expected_TV: Tensor) -> float:
    """Return the norm of the difference from the logits expected, relative to theirs, over tokens not masked out."""
    is_compared_TV = expected_TV.abs() < _LARGEST_LOGIT
    expected = expected_TV[is_compared_TV].float()
    difference = logits_TV[is_compared_TV].float() - expected
    return float(difference.norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


class _FixedTokens(LogitsProcessor):
    """Leaves the token whose id is its place in the completion."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_id = (input_ids.shape[1] - self._prompt_length) % scores.shape[1]
        fixed_BV = torch.full_like(scores, -torch.inf)
        fixed_BV[:, token_id] = 0.0
        return fixed_BV

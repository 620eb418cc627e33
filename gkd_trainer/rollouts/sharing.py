"""Which prompts may share a batch of a model: all, those of one length, or none.

Shapes: B batch, L length, T new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gkd_trainer.models.heads import needs_autocast, vocabulary_size, without_router_logits
from gkd_trainer.rollouts.prompts import PromptBatch

logger = logging.getLogger(__name__)

_SHORT_PROBE, _OTHER_PROBE, _LONG_PROBE = range(3), range(3, 6), range(6, 30)
_PROBE_PADDING, _PROBE_OTHER_PADDING = 30, 31
_PROBE_NEW_TOKENS = 3

_LEAST_TOLERANCE = 1e-3
"""The relative difference up to which logits count as equal, whatever the dtype."""

_ROUNDING_FACTOR = 4
"""How many times larger the rounding may be between one pair of shapes than between another."""

_LARGEST_LOGIT = 1e4
"""Logits of larger magnitude are masks: infinity, or the lowest number of a dtype."""


class Sharing(IntEnum):
    """Which prompts may share a batch."""

    ANY = 0
    EQUAL_LENGTH = 1
    NONE = 2


def find_sharing(model: Any, pad_token_id: int, is_sharded: bool) -> Sharing:
    """Return which prompts may share a batch of a model that is ready to generate; log it if not all may.

    This is tested on the logits of a few tokens generated alone, next to another prompt, and after padding. A model
    that can't be probed generates one completion at a time.
    """
    probe = functools.partial(_probe, model, pad_token_id, is_sharded)
    name = type(model).__name__
    try:
        with _unrounded(model):
            [short_TV], [long_TV] = probe(_SHORT_PROBE), probe(_LONG_PROBE)
            beside_TV, _ = probe(_SHORT_PROBE, _OTHER_PROBE)
            unpadded_TV, padded_TV = probe(_LONG_PROBE, _SHORT_PROBE)
            _, other_padding_TV = probe(_LONG_PROBE, _SHORT_PROBE, padding_id=_PROBE_OTHER_PADDING)
            tolerance = _tolerance(model, is_sharded)
    except Exception as error:  # an unknown model may raise anything
        logger.warning(
            "Could not test whether %s can generate in batches (%s: %s): it generates one completion at a time, "
            "which takes longer.",
            name,
            type(error).__name__,
            error,
        )
        return Sharing.NONE
    beside = [_difference(beside_TV, short_TV), _difference(unpadded_TV, long_TV)]
    if not all(difference <= tolerance for difference in beside):  # NaN is more than any tolerance
        logger.warning(
            "%s mixes the prompts of a batch: it generates one completion at a time, which takes longer.",
            name,
        )
        return Sharing.NONE
    rounding = max(beside)
    is_padding_hidden = (
        _difference(padded_TV, short_TV) <= max(_LEAST_TOLERANCE, _ROUNDING_FACTOR * rounding)
        # Both have the same shape, so they round alike.
        and _difference(other_padding_TV, padded_TV) <= max(_LEAST_TOLERANCE, rounding)
    )
    if not is_padding_hidden:
        logger.warning(
            "%s reads the padding of a batch despite the mask: only prompts of equal length share a batch, which "
            "takes longer.",
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
    vocab_size = vocabulary_size(model)
    tokens = [[token_id % vocab_size for token_id in prompt] for prompt in prompts]
    batch = PromptBatch.of(model, tokens, padding_id % vocab_size)
    config = GenerationConfig(
        max_new_tokens=_PROBE_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
        **batch.config_options,
    )
    output = model.generate(
        input_ids=batch.ids_BL,
        attention_mask=batch.mask_BL,
        generation_config=config,
        logits_processor=LogitsProcessorList([_FixedTokens(batch.n_given)]),
        synced_gpus=is_sharded,
        **without_router_logits(model),
    )
    return torch.stack(output.logits, dim=1)


@contextmanager
def _unrounded(model: Any) -> Iterator[None]:
    """Disable autocast and TF32 if the weights are float32: they affect rounding, but not which inputs a model reads.

    In bfloat16, the effect of padding can be smaller than the rounding between two lengths. A model that
    `needs_autocast` keeps it.
    """
    is_float32 = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    if not is_float32 or needs_autocast(model):
        yield
        return
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = precision


def _tolerance(model: Any, is_sharded: bool) -> float:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device_type = model.device.type
    if torch.is_autocast_enabled(device_type):
        dtypes.add(torch.get_autocast_dtype(device_type))
    if is_sharded:  # gathering may change the dtype
        dtypes.add(torch.bfloat16)
    # 8-bit dtypes are for storage, not for computing.
    return max([4 * torch.finfo(dtype).eps for dtype in dtypes if torch.finfo(dtype).bits >= 16] + [_LEAST_TOLERANCE])


def _difference(logits_TV: Tensor, expected_TV: Tensor) -> float:
    """Return the norm of the difference from the expected logits, relative to their norm, over unmasked tokens."""
    is_compared_TV = expected_TV.abs() < _LARGEST_LOGIT
    expected = expected_TV[is_compared_TV].float()
    difference = logits_TV[is_compared_TV].float() - expected
    return float(difference.norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


class _FixedTokens(LogitsProcessor):
    """Leaves only the token whose id is its index in the completion."""

    def __init__(self, n_given: int) -> None:
        self._n_given = n_given

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_id = (input_ids.shape[1] - self._n_given) % scores.shape[1]
        fixed_BV = torch.full_like(scores, -torch.inf)
        fixed_BV[:, token_id] = 0.0
        return fixed_BV

"""Rollouts by `transformers.generate`, on the weights being trained.

Shapes: B batch, L length, T new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gkd_trainer.models.heads import without_router_logits
from gkd_trainer.models.loading import base_model
from gkd_trainer.quiet import quiet_padding
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.media import joined
from gkd_trainer.rollouts.prompts import PromptBatch
from gkd_trainer.rollouts.sharing import Sharing, find_sharing
from gkd_trainer.types import Completion, PromptMedia, Sampling

logger = logging.getLogger(__name__)

T = TypeVar("T")

_READ_THE_PROMPT = frozenset(
    {
        "bad_words_ids",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "forced_bos_token_id",
        "no_repeat_ngram_size",
        "sequence_bias",
    }
)
"""Options of transformers whose logits processors take padding for part of the prompt."""


class HFRollouts(RolloutEngine):
    """Completions by `transformers.generate`: no second copy of the weights, no extra package.

    Args:
        stop_ids: A completion ends with the first of these tokens.
        pad_token_id: Pads the prompts of a batch on the left, or on the right for an encoder; masked out.
        vocab_size: Ids of this value or above, which only pad the head, are never sampled; None allows all.
        batch_size: Maximum number of prompts in one call of `generate`; None is no limit.
        is_sharded: Whether the model's weights are sharded over ranks, which must then run the same number of forwards:
            each calls transformers' `generate` as often as the others, even without prompts, and `batch_size` has no
            effect. It then takes no images: ranks without any would not run the image encoder.
        never_sampled: Ids below `vocab_size` that are never sampled, such as that of an image.

    Prompts share a batch only if that changes nothing. Recurrent models may read padding or mix the prompts of a batch.
    This is tested once, on the logits of a few tokens generated alone, next to another prompt, and after padding with
    two different ids. The tolerance is the rounding between batches without padding.

    The encoder of an encoder-decoder reads the prompts, and completions leave out the decoder's start token.
    """

    def __init__(
        self,
        stop_ids: Sequence[int],
        pad_token_id: int = 0,
        vocab_size: int | None = None,
        batch_size: int | None = None,
        is_sharded: bool = False,
        never_sampled: Collection[int] = (),
    ) -> None:
        self._stop_ids = sorted(set(stop_ids))
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        self._batch_size = None if is_sharded else batch_size
        self._is_sharded, self.takes_media = is_sharded, not is_sharded
        self._never_sampled = sorted(never_sampled)
        self._model: Any = None
        self._wrapped: nn.Module | None = None
        self._probed: tuple[Any, Sharing] | None = None

    def sync(self, model: nn.Module) -> None:
        """Generate with `model` from now on; its weights are shared, not copied."""
        self._model = base_model(model)
        self._wrapped = model if self._is_sharded and model is not self._model else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[Completion]:
        """Return one completion per prompt; see RolloutEngine."""
        if self._model is None:
            raise RuntimeError("HFRollouts.generate was called before sync(model)")
        media = media or [None] * len(prompts)
        completions: dict[int, Completion] = {}
        with (
            ready_to_generate(self._model),
            _calling(self._wrapped, self._model),
            quiet_padding(),  # prompts are padded on the left
            torch.no_grad(),
        ):
            for indices in self._batches(prompts, sampling, media):
                if not indices:  # other ranks generate; once it is done, generate calls the forward until they are too
                    self._generate_batch([[self._pad_token_id]], Sampling(1, temperature=0.0), [0], [])
                    continue
                batch = self._generate_batch(
                    [prompts[index] for index in indices],
                    sampling,
                    [seeds[index] for index in indices],
                    [item for index in indices if (item := media[index]) is not None],
                )
                completions.update(zip(indices, batch, strict=True))
        return [completions[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Drop the reference to the model."""
        self._model = self._wrapped = self._probed = None

    def _batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, media: Sequence[PromptMedia | None]
    ) -> list[list[int]]:
        """Return the prompts for each call of transformers' `generate`; none for a call that only other ranks need.

        Prompts with images do not share one with those without.
        """

        def length(index: int) -> int:
            return len(prompts[index])

        # Sorted by length: a batch is as wide as its longest prompt.
        order = sorted(range(len(prompts)), key=length)
        size = self._batch_size or max(1, len(prompts))
        if not self._is_sharded and (size == 1 or len(prompts) < 2):
            return [[index] for index in order]
        sharing = self._sharing()
        if sharing is Sharing.ANY and any(sampling.extra.get(name) is not None for name in _READ_THE_PROMPT):
            sharing = Sharing.EQUAL_LENGTH
        if self._is_sharded:
            groups = _grouped(order, sharing, length)
            keys = set(itertools.chain(*_of_all_ranks(list(groups))))
            return [groups.get(key, []) for key in sorted(keys)]
        return [
            group[start : start + size]
            for has_media in (False, True)
            for group in _grouped([i for i in order if (media[i] is not None) == has_media], sharing, length).values()
            for start in range(0, len(group), size)
        ]

    def _sharing(self) -> Sharing:
        """Return which prompts may share a batch; tested once per model."""
        if self._probed is None or self._probed[0] is not self._model:
            sharing = find_sharing(self._model, self._pad_token_id, self._is_sharded)
            if self._is_sharded:
                sharing = max(_of_all_ranks(sharing))
            self._probed = self._model, sharing
        return self._probed[1]

    def _generate_batch(
        self, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int], media: list[PromptMedia]
    ) -> list[Completion]:
        """Complete prompts in one call; `media` has the images of each, or is empty."""
        batch = PromptBatch.of(self._model, prompts, self._pad_token_id)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            # Our logits processor samples, and leaves one token: generate's own sampling uses the global RNG.
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self._stop_ids or None,
            pad_token_id=self._pad_token_id,
            **batch.config_options,
            **sampling.extra,
        )
        _forget_last_call(self._model, len(prompts))
        output_BL: Tensor = self._model.generate(
            input_ids=batch.ids_BL,
            attention_mask=batch.mask_BL,
            generation_config=config,
            logits_processor=self._processors(sampling, seeds, batch),
            synced_gpus=self._is_sharded,
            **without_router_logits(self._model),
            **_media_inputs(media, batch.ids_BL, inspect.signature(self._model.forward).parameters),
        )
        return [self._completion(row) for row in output_BL[:, batch.n_given :].tolist()]

    def _processors(self, sampling: Sampling, seeds: list[int], batch: PromptBatch) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1 and batch.start_id is None:
            processors.append(_RepetitionPenalty(sampling.repetition_penalty, batch.mask_BL.bool()))
        elif sampling.repetition_penalty != 1:
            # Only new tokens: the start token is BART's eos, which would be discouraged.
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, batch.n_given))
        if self._vocab_size is not None or self._never_sampled:
            processors.append(_VocabularyLimit(self._vocab_size, self._never_sampled))
        if sampling.temperature == 0:
            return processors
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            processors.append(MinPLogitsWarper(sampling.min_p))
        processors.append(_SeededChoice(seeds, sampling.max_new_tokens, batch.given_mask_BL))
        return processors

    def _completion(self, new_ids: list[int]) -> Completion:
        for position, token_id in enumerate(new_ids):
            if token_id in self._stop_ids:
                return Completion(new_ids[: position + 1], is_finished=True)
        return Completion(new_ids, is_finished=False)


@contextmanager
def ready_to_generate(model: Any) -> Iterator[None]:
    """Set eval mode, no gradient checkpointing, and a neutral generation config; restore all on exit."""
    in_training = [module for module in model.modules() if module.training]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    generation_config = model.generation_config
    model.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False
    # generate takes every unset field from the model's own config: its penalties and top-k would leak in.
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module in in_training:
            module.training = True


def _grouped(order: list[int], sharing: Sharing, length: Callable[[int], int]) -> dict[int, list[int]]:
    """Return the prompts that may share a batch, by a key that is the same on all ranks."""
    if sharing is Sharing.ANY:
        return {0: order} if order else {}
    if sharing is Sharing.EQUAL_LENGTH:
        return {key: list(indices) for key, indices in itertools.groupby(order, key=length)}
    return {place: [index] for place, index in enumerate(order)}


class _VocabularyLimit(LogitsProcessor):
    def __init__(self, vocab_size: int | None, never_sampled: list[int]) -> None:
        self._vocab_size, self._never_sampled = vocab_size, never_sampled

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._vocab_size is not None:
            scores[:, self._vocab_size :] = -torch.inf
        scores[:, self._never_sampled] = -torch.inf
        return scores


class _RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' penalty without the padding, which would penalise the pad token for shorter prompts only."""

    def __init__(self, penalty: float, prompt_mask_BL: Tensor) -> None:
        super().__init__(penalty)
        self._prompt_mask_BL = prompt_mask_BL

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = self._prompt_mask_BL.shape[1]
        prompt_BL = torch.where(self._prompt_mask_BL, input_ids[:, :length], input_ids[:, length - 1 : length])
        penalised_BV: Tensor = super().__call__(torch.cat([prompt_BL, input_ids[:, length:]], dim=1), scores)
        return penalised_BV


class _SeededChoice(LogitsProcessor):
    """Inverse transform sampling with one uniform per prompt and step, drawn in advance from the prompt's seed."""

    def __init__(self, seeds: list[int], max_new_tokens: int, prompt_mask_BL: Tensor) -> None:
        uniforms_BT = np.stack([np.random.Generator(np.random.Philox(seed)).random(max_new_tokens) for seed in seeds])
        # float64 has no kernel on MPS.
        self._device = torch.device("cpu") if prompt_mask_BL.device.type == "mps" else prompt_mask_BL.device
        # Below 1 by more than a product's rounding, so that the choice never passes the last token.
        self._uniforms_BT = torch.from_numpy(uniforms_BT * (1 - 2.0**-32)).to(self._device)
        self._prompt_length = prompt_mask_BL.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        with _nondeterministic_allowed():
            cumulative_BV = scores.to(self._device, torch.float64).softmax(dim=-1).cumsum(dim=-1)
        threshold_B1 = self._uniforms_BT[:, step : step + 1] * cumulative_BV[:, -1:]
        # The first token whose cumulative probability exceeds the threshold: never one of probability zero.
        chosen_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).to(scores.device)
        # Past the end if the logits hold NaN: any token will do, since the loss reports the error.
        chosen_B1 %= scores.shape[1]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


@contextmanager
def _nondeterministic_allowed() -> Iterator[None]:
    """Allow CUDA's cumsum under `full_determinism`, which refuses it.

    In float64, its sums may differ between runs in their last bits: next to never enough to change a choice.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warns)


def _media_inputs(media: list[PromptMedia], ids_BL: Tensor, parameters: Collection[str]) -> dict[str, Tensor]:
    """Return the arguments of a forward for the images of prompts, which are padded on the left in `ids_BL`."""
    if not media:
        return {}
    length = ids_BL.shape[1]
    inputs = joined(media)
    for name in media[0].per_token:
        # generate refuses what the forward only takes among its **kwargs; tokenizers return token_type_ids unasked.
        if name == "token_type_ids" and name not in parameters:
            continue
        values = [item.per_token[name] for item in media]
        inputs[name] = torch.stack([nn.functional.pad(each, (length - len(each), 0)) for each in values])
    return {name: value.to(ids_BL.device) for name, value in inputs.items()}


def _forget_last_call(model: Any, batch_size: int) -> None:
    """Clear the state that RecurrentGemma keeps in its layers; a prompt of one token would continue from it."""
    set_up = getattr(model, "_setup_cache", None)
    if set_up is not None:
        set_up(model.config, batch_size, model.device, model.get_input_embeddings().weight.dtype)


def _of_all_ranks(value: T) -> list[T]:
    """Return the value of every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def _calling(wrapped: nn.Module | None, model: Any) -> Iterator[None]:
    """Route calls of `model` through its wrapper, if any, whose hooks gather sharded weights."""
    if wrapped is None:
        yield
        return
    forward, is_own = model.forward, "forward" in vars(model)
    is_inside = False

    @functools.wraps(forward)
    def enter(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return forward(*args, **kwargs)
        is_inside = True
        try:
            return wrapped(*args, **kwargs)
        finally:
            is_inside = False

    model.forward = enter
    try:
        yield
    finally:
        if is_own:
            model.forward = forward
        else:
            del model.forward

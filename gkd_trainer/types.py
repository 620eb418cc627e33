"""The typed values passed between stages: token batches and completions.

Shapes: B batch, L length, N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.batch_keys import (
    IGNORE_INDEX,
    IS_ON_POLICY,
    NOT_MODEL_INPUTS,
    PER_LABEL,
    PER_TOKEN,
    SAMPLING_LOG_PROBS,
    SIDE_TENSORS,
    has_decoder_inputs,
)
from gkd_trainer.right_padding import right_padded
from gkd_trainer.transfer import all_to_device, integers_to_host, to_device


@dataclass(frozen=True)
class MediaTokens:
    """The token ids that stand for an image, a video or sound in a model's input; None for what it does not take."""

    image: int | None = None
    video: int | None = None
    audio: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        """All of them."""
        return frozenset(token_id for token_id in (self.image, self.video, self.audio) if token_id is not None)


@dataclass(frozen=True)
class PromptMedia:
    """The images of one prompt, for a model's forward.

    `inputs` are values of MEDIA_INPUTS as a collator returns them for a batch of only this prompt; `mm_token_type_ids`
    and `token_type_ids` have one value per token of the prompt, and are None if the collator returns none.
    """

    inputs: Mapping[str, Tensor]
    mm_token_type_ids: Tensor | None = None
    token_type_ids: Tensor | None = None

    @property
    def per_token(self) -> dict[str, Tensor]:
        """The values per token, by name."""
        values = {"mm_token_type_ids": self.mm_token_type_ids, "token_type_ids": self.token_type_ids}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn from a model's next-token distribution.

    `temperature` 0 is greedy decoding. `top_k` 0, `top_p` 1, `min_p` None and `repetition_penalty` 1 switch
    the respective restriction off. `extra` holds options that only one engine has.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What an engine generated for one prompt.

    `token_ids` end with the stop token if `is_finished`; otherwise they were cut off at `max_new_tokens`. `is_trained`
    marks the tokens to train on, which excludes those that a tool wrote; None trains on all.

    `log_probs` is what an engine with numerics of its own computed for each token: its log-probability over the whole
    vocabulary, at temperature 1 and before any restriction, NaN if unknown. The trainer compares them with the
    student's own. None for an engine that runs the student itself. Their rounding does not make completions differ.

    Raises:
        ValueError: `is_trained` or `log_probs` differ from `token_ids` in length.

    """

    token_ids: Sequence[int]
    is_finished: bool
    is_trained: Sequence[bool] | None = None
    log_probs: Sequence[float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, values in (("is_trained", self.is_trained), ("log_probs", self.log_probs)):
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(
                    f"{name} must have one value for each of the completion's {len(self.token_ids)} tokens; "
                    f"got {len(values)}"
                )


@dataclass(frozen=True)
class Generated:
    """A completion with its prompt, and whether the student (else the teacher) generated it."""

    prompt: Sequence[int]
    completion: Completion
    is_on_policy: bool


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of token sequences.

    `model_inputs` holds the arguments of the models' forward (`input_ids` [B, L], and `attention_mask` and others
    if the collator gave them), padded on the right; `labels_BL` the token ids, with IGNORE_INDEX for tokens that are
    not trained on; `is_on_policy_B` marks the samples that the student generated. The logits at position i predict the
    label at i + `label_offset`: 1 for a causal LM, 0 for a decoder that gets its labels shifted (encoder-decoders).
    `side` holds the batch's other SIDE_TENSORS, by name.

    For an encoder-decoder, `input_ids` and `attention_mask` are the encoder's, of another length than the labels, and
    `decoder_input_ids` [B, L] the decoder's.

    Derived values are computed once. How many positions are scored depends on the labels, so they are found on the
    host: see `on_host`.
    """

    model_inputs: Mapping[str, Tensor]
    labels_BL: Tensor
    is_on_policy_B: Tensor
    label_offset: int = 1
    side: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], label_offset: int | None = None) -> TokenBatch:
        """Build a batch from what Trainer hands to `compute_loss`; without a mark, no sample is on-policy.

        Rows come out `right_padded`. By default the label offset is 0 if there are decoder inputs, else 1.
        """
        if label_offset is None:
            label_offset = 0 if has_decoder_inputs(inputs) else 1
        inputs = right_padded(inputs)
        model_inputs = {key: value for key, value in inputs.items() if key not in NOT_MODEL_INPUTS}
        labels_BL = inputs["labels"]
        is_on_policy_B = inputs.get(IS_ON_POLICY)
        if is_on_policy_B is None:
            is_on_policy_B = torch.zeros(labels_BL.shape[0], dtype=torch.bool, device=labels_BL.device)
        side = {name: inputs[name] for name in SIDE_TENSORS if name in inputs and name != IS_ON_POLICY}
        return cls(model_inputs, labels_BL, is_on_policy_B, label_offset, side)

    @cached_property
    def is_scored_BL(self) -> Tensor:
        """True at each position whose logits predict a token that is trained on: the models are compared there."""
        is_scored_BL = torch.zeros_like(self.labels_BL, dtype=torch.bool)
        end = self.labels_BL.shape[1] - self.label_offset
        is_scored_BL[:, :end] = self.labels_BL[:, self.label_offset :] != IGNORE_INDEX
        return is_scored_BL

    @cached_property
    def on_host(self) -> TokenBatch:
        """The same batch with its integers on the CPU, to be read by the host; itself if it is there.

        Copying them waits for the device, unless they were `known_on_host`.
        """
        if self.labels_BL.device.type == "cpu":
            return self
        own = {"labels": self.labels_BL, IS_ON_POLICY: self.is_on_policy_B}
        inputs, side, own = (integers_to_host(values) for values in (self.model_inputs, self.side, own))
        return TokenBatch(inputs, own["labels"], own[IS_ON_POLICY], self.label_offset, side)

    def known_on_host(self, host: TokenBatch) -> TokenBatch:
        """Return this batch, whose values `host` has on the CPU: then nothing waits for the device to read them."""
        batch = replace(self)
        vars(batch)["on_host"] = host  # not a field: `dataclasses.replace` must not keep it beside other values
        return batch

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on a device; one from the CPU without waiting for the device."""
        if device == self.labels_BL.device:
            return self
        moved = TokenBatch(
            all_to_device(self.model_inputs, device),
            to_device(self.labels_BL, device),
            to_device(self.is_on_policy_B, device),
            self.label_offset,
            all_to_device(self.side, device),
        )
        return moved if device.type == "cpu" else moved.known_on_host(self.on_host)

    def with_side(self, name: str, value: Tensor) -> TokenBatch:
        """Return the batch with one of SIDE_TENSORS, given on the CPU."""
        batch = replace(self, side={**self.side, name: to_device(value, self.labels_BL.device)})
        return batch if self.on_host is self else batch.known_on_host(self.on_host.with_side(name, value))

    @cached_property
    def _positions_N2(self) -> Tensor:
        if self.on_host is self:
            return self.is_scored_BL.nonzero()
        return to_device(self.on_host._positions_N2, self.labels_BL.device)

    @property
    def rows_N(self) -> Tensor:
        """The row in the batch of each scored position, in ascending order."""
        return self._positions_N2[:, 0]

    @property
    def columns_N(self) -> Tensor:
        """The column of each scored position: `values_BL[rows_N, columns_N]` selects without waiting for the device."""
        return self._positions_N2[:, 1]

    @cached_property
    def targets_N(self) -> Tensor:
        """The token id that each scored position predicts."""
        return self.labels_BL[self.rows_N, self.columns_N + self.label_offset]

    @cached_property
    def sampling_log_probs_N(self) -> Tensor | None:
        """What the rollout engine computed for each token trained on (see SAMPLING_LOG_PROBS); None if for none."""
        values_BL = self.side.get(SAMPLING_LOG_PROBS)
        return None if values_BL is None else values_BL[self.rows_N, self.columns_N + self.label_offset]

    @property
    def n_scored(self) -> int:
        """How many positions are scored: N."""
        return len(self._positions_N2 if self.on_host is self else self.on_host._positions_N2)

    def of_samples(self, rows: Sequence[int]) -> TokenBatch:
        """Return the batch of some samples, given in ascending order: the scored positions are theirs, in order.

        Columns stay, padding included. If the forward takes tensors whose samples are unknown, such as images, all
        samples stay in the batch, and the other samples' labels are masked; but no samples are always an empty batch.
        """
        batch = self._of_samples(rows)
        return batch if self.on_host is self else batch.known_on_host(self.on_host._of_samples(rows))

    def _of_samples(self, rows: Sequence[int]) -> TokenBatch:
        chosen = to_device(torch.tensor(rows, dtype=torch.long), self.labels_BL.device)
        is_tensor = {name: isinstance(value, Tensor) for name, value in self.model_inputs.items()}
        is_known = {name: name in PER_TOKEN | PER_LABEL or not is_tensor[name] for name in self.model_inputs}
        if not rows or all(is_known.values()):
            inputs = {
                name: _of_rows(name, value, chosen) if is_tensor[name] else value
                for name, value in self.model_inputs.items()
                if is_known[name]
            }
            labels_BL, is_on_policy_B = self.labels_BL[chosen], self.is_on_policy_B[chosen]
            side = {name: value[chosen] for name, value in self.side.items()}
            return TokenBatch(inputs, labels_BL, is_on_policy_B, self.label_offset, side)
        is_chosen_B1 = torch.zeros_like(self.labels_BL[:, :1], dtype=torch.bool).index_fill(0, chosen, True)
        return replace(self, labels_BL=self.labels_BL.masked_fill(~is_chosen_B1, IGNORE_INDEX))


def _of_rows(name: str, values: Tensor, rows: Tensor) -> Tensor:
    """Return the values per token of some rows; those of `position_ids` may be [..., B, L]."""
    return values.index_select(values.dim() - 2 if name == "position_ids" else 0, rows)


def prompt_length(labels: Sequence[int]) -> int:
    """Return how many tokens precede the last run of trained labels.

    They are the prompt for which a completion can be sampled. A row without trained labels is all prompt; 0 means that
    there is no prompt, since the first token is already trained on.
    """
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    if end == 0:
        return len(labels)
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return start

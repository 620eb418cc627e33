"""The typed values passed between stages: token batches and completions.

Shapes: B batch, L length, N tokens trained on, P length of a sample's own prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.transfer import all_to_device, integers_to_host, to_device

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""

IS_ON_POLICY = "is_on_policy"
"""The key of a batch's mask of samples that the student generated."""

PROMPT_IDS = "on_policy_prompt_ids"
"""The key of a sample's own prompt, if it differs from the tokens before the sample's last trained run.

In a row, a list of token ids, empty if there is none; in a batch, a tensor [B, P] padded with IGNORE_INDEX.
"""

ROW_KEY = "row_key"
"""The key of the integer that identifies a row of a data set; in a batch, an int64 tensor [B]."""

TEACHER_INDEX = "teacher_index"
"""The key of a sample's teacher: its index among several, from 0, in a batch an int64 tensor [B]; -1 if unknown."""

TEACHER_PROMPT_IDS = "teacher_prompt_ids"
"""The key of a prompt that the teacher reads instead of the sample's own, in the teacher's token ids.

A teacher with another tokenizer reads it, and a Teacher of your own may. In a row, a list of token ids, empty if there
is none; in a batch, a tensor [B, P] padded with IGNORE_INDEX.
"""

TEACHER_IDS = "teacher_ids"
"""The key of a sample in the teacher's tokens, if these are not the student's: int64 [B, P], padded with IGNORE_INDEX.

It comes with TEACHER_COLUMNS, int64 [B, P] likewise: the column in it of the token that the teacher predicts at each
scored position of the sample, in order.
"""

TEACHER_COLUMNS = "teacher_columns"
"""The key of the teacher's columns; see TEACHER_IDS."""


@dataclass(frozen=True)
class SideTensor:
    """A value per sample that a batch carries with its tokens, and that no model's forward gets.

    `filling` stands for a missing value, and pads the shorter lists of a batch. `is_column` says that a data set may
    have it as a column, `is_list` that a row's value is a list (in a batch [B, P], else [B]), and
    `survives_completion` that a sample keeps its value, instead of getting `filling`, when it gets a completion.
    """

    name: str
    filling: int
    is_column: bool
    is_list: bool
    survives_completion: bool


SIDE_TENSORS: Mapping[str, SideTensor] = {
    side.name: side
    for side in (
        SideTensor(IS_ON_POLICY, filling=False, is_column=False, is_list=False, survives_completion=False),
        # A generated completion stands right after its prompt.
        SideTensor(PROMPT_IDS, filling=IGNORE_INDEX, is_column=True, is_list=True, survives_completion=False),
        SideTensor(ROW_KEY, filling=-1, is_column=True, is_list=False, survives_completion=True),
        SideTensor(TEACHER_INDEX, filling=-1, is_column=True, is_list=False, survives_completion=True),
        SideTensor(TEACHER_PROMPT_IDS, filling=IGNORE_INDEX, is_column=True, is_list=True, survives_completion=True),
        SideTensor(TEACHER_IDS, filling=IGNORE_INDEX, is_column=False, is_list=True, survives_completion=False),
        SideTensor(TEACHER_COLUMNS, filling=IGNORE_INDEX, is_column=False, is_list=True, survives_completion=False),
    )
}
"""All side tensors, by name."""

MEDIA_INPUTS = frozenset(
    {
        "pixel_values",
        "pixel_values_images",
        "pixel_values_videos",
        "pixel_attention_mask",
        "image_sizes",
        "image_grid_thw",
        "image_position_ids",
        "video_grid_thw",
        "video_position_ids",
        "video_second_per_grid",
        "second_per_grid_ts",
        "spatial_shapes",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "input_features",
        "input_features_mask",
        "feature_attention_mask",
    }
)
"""A collator's values, sizes and masks of images, videos and sound, per sample or per image."""

PER_SAMPLE = MEDIA_INPUTS.union(SIDE_TENSORS, {"prompts", "prompt_attention_mask"})
"""Keys of a batch that are known to hold values per sample or image, whatever their shape."""

PER_TOKEN = frozenset(
    {
        "input_ids",
        "labels",
        "attention_mask",
        "completion_mask",
        "assistant_masks",
        "position_ids",
        "token_type_ids",
        "mm_token_type_ids",
        "byte_offsets",
    }
)
"""Keys of a batch that are known to hold values per token [B, L, ...]; `position_ids` may be [..., B, L]."""

DECODER_INPUT_IDS = "decoder_input_ids"
"""The key of a decoder's inputs, which shows that a batch is for an encoder-decoder."""

PER_LABEL = frozenset({"labels", DECODER_INPUT_IDS, "decoder_attention_mask"})
"""Keys of an encoder-decoder's batch whose values are per label; its other values per token are the encoder's."""

_NOT_MODEL_INPUTS = frozenset(SIDE_TENSORS).union(
    {
        "labels",
        # Rows of tokens may have these in place of labels.
        "completion_mask",
        "assistant_masks",
        # Added by TRL's DataCollatorForChatML.
        "prompts",
        "prompt_attention_mask",
        "byte_offsets",
    }
)


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
    has one value per token of the prompt, and is None if the model takes none.
    """

    inputs: Mapping[str, Tensor]
    mm_token_type_ids: Tensor | None = None


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

    Raises:
        ValueError: `is_trained` and `token_ids` differ in length.

    """

    token_ids: Sequence[int]
    is_finished: bool
    is_trained: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if self.is_trained is not None and len(self.is_trained) != len(self.token_ids):
            raise ValueError(
                f"is_trained must have one value for each of the completion's {len(self.token_ids)} tokens; "
                f"got {len(self.is_trained)}"
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
        model_inputs = {key: value for key, value in inputs.items() if key not in _NOT_MODEL_INPUTS}
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
        """Return a batch from the CPU on a device, without waiting for it."""
        if device.type == "cpu":
            return self
        moved = TokenBatch(
            all_to_device(self.model_inputs, device),
            to_device(self.labels_BL, device),
            to_device(self.is_on_policy_B, device),
            self.label_offset,
            all_to_device(self.side, device),
        )
        return moved.known_on_host(self)

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


def has_decoder_inputs(inputs: Mapping[str, Any]) -> bool:
    """Return whether a collated batch is for an encoder-decoder, and has its decoder's inputs."""
    return inputs.get(DECODER_INPUT_IDS) is not None


def may_be_per_token(name: str, value: Any) -> bool:
    """Return whether a collated value is a tensor of unknown name that may have one value per token.

    Its shape does not decide: a dimension may equal L by chance.
    """
    return isinstance(value, Tensor) and value.dim() > 1 and name not in PER_TOKEN | PER_SAMPLE | PER_LABEL


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

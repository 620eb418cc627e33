"""The keys of a collated batch, by what their values are: per token, per label, per sample, or aside of any forward.

Shapes: B batch, L length, P length of a sample's own prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""

IS_ON_POLICY = "is_on_policy"
"""The key of a batch's mask of samples that the student generated."""

PROMPT_IDS = "on_policy_prompt_ids"
"""The key of a sample's own prompt, if it differs from the tokens before the sample's last trained run.

In a row, a list of token ids, empty if there is none; in a batch, a tensor [B, P] padded with IGNORE_INDEX.
"""

ROW_KEY = "row_key"
"""The key of the integer that identifies a row of a dataset; in a batch, an int64 tensor [B]."""

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

SAMPLING_LOG_PROBS = "sampling_log_probs"
"""The key of what the rollout engine computed for each token of the student's completions: see `Completion.log_probs`.

In a batch, floats [B, L] in the columns of the labels, NaN where there is none.
"""


@dataclass(frozen=True)
class SideTensor:
    """A value per sample that a batch carries with its tokens, and that no model's forward gets.

    `filling` stands for a missing value, and pads the shorter lists of a batch. `is_column` says that a dataset may
    have it as a column, `is_list` that a row's value is a list (in a batch [B, P], else [B]), and
    `survives_completion` that a sample keeps its value, instead of getting `filling`, when it gets a completion.
    """

    name: str
    filling: float
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
        SideTensor(SAMPLING_LOG_PROBS, filling=math.nan, is_column=False, is_list=True, survives_completion=False),
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

NOT_MODEL_INPUTS = frozenset(SIDE_TENSORS).union(
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
"""Keys of a batch that no model's forward gets."""


def has_decoder_inputs(inputs: Mapping[str, Any]) -> bool:
    """Return whether a collated batch is for an encoder-decoder, and has its decoder's inputs."""
    return inputs.get(DECODER_INPUT_IDS) is not None


def may_be_per_token(name: str, value: Any) -> bool:
    """Return whether a collated value is a tensor of unknown name that may have one value per token.

    Its shape does not decide: a dimension may equal L by chance.
    """
    return isinstance(value, Tensor) and value.dim() > 1 and name not in PER_TOKEN | PER_SAMPLE | PER_LABEL

"""Padding moves behind the tokens with everything that has one value per token, and values come back."""

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS
from gkd_trainer.right_padding import in_columns_of, right_padded

X = IGNORE_INDEX

MASK_BL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
COLUMNS_BL = torch.arange(4).expand(4, 4)
COLUMNS_MOVED_BL = torch.tensor([[2, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0]])


def padded_anywhere(**others):
    labels_BL = COLUMNS_BL.masked_fill(MASK_BL == 0, X)
    return {"input_ids": COLUMNS_BL, "attention_mask": MASK_BL, "labels": labels_BL, **others}


def test_padding_moves_behind_the_tokens_with_all_that_is_known_to_be_per_token():
    inputs = padded_anywhere(
        position_ids=torch.stack([COLUMNS_BL, COLUMNS_BL * 10]),
        byte_offsets=COLUMNS_BL[..., None] + torch.tensor([0.0, 0.5]),
        row_weight=torch.ones(4),
        names=["a", "b", "c", "d"],
    )
    moved = right_padded(inputs)
    assert moved["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert torch.equal(moved["input_ids"], COLUMNS_MOVED_BL)
    assert torch.equal(moved["position_ids"], torch.stack([COLUMNS_MOVED_BL, COLUMNS_MOVED_BL * 10]))
    assert torch.equal(moved["byte_offsets"], COLUMNS_MOVED_BL[..., None] + torch.tensor([0.0, 0.5]))
    assert moved["labels"].tolist() == [[2, 3, X, X], [0, 1, 2, X], [X] * 4, [1, 2, X, X]]
    assert moved["row_weight"] is inputs["row_weight"]
    assert moved["names"] is inputs["names"]


@pytest.mark.parametrize("name", [PROMPT_IDS, "prompts", "prompt_attention_mask", "pixel_values"])
def test_per_sample_values_stay_even_if_shaped_like_tokens(name):
    value = torch.arange(16).view(4, 4)
    moved = right_padded(padded_anywhere(**{name: value}))
    assert torch.equal(moved["input_ids"], COLUMNS_MOVED_BL)
    assert moved[name] is value


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_bias", (4, 1, 4, 4)),
        ("mrope_position_ids", (3, 4, 4)),
        ("token_embeddings", (4, 4, 2)),
        ("sample_features", (4, 3)),
        ("position_ids", (1, 4)),
        ("token_type_ids", (4, 1, 4)),
    ],
)
def test_padding_stays_where_a_tensor_could_lose_its_tokens(name, shape):
    inputs = padded_anywhere(**{name: torch.zeros(shape)})
    moved = right_padded(inputs)
    assert moved.keys() == inputs.keys()
    assert all(moved[key] is inputs[key] for key in inputs)
    values_BL = torch.rand(4, 4)
    assert in_columns_of(inputs, values_BL) is values_BL


def test_values_of_right_padded_rows_come_back_to_the_columns_of_their_tokens():
    inputs = padded_anywhere()
    moved = right_padded(inputs)
    assert torch.equal(in_columns_of(inputs, moved["labels"]), inputs["labels"])
    logits_BLV = moved["input_ids"][..., None] + torch.tensor([0.0, 0.5])
    assert torch.equal(in_columns_of(inputs, logits_BLV), inputs["input_ids"][..., None] + torch.tensor([0.0, 0.5]))
    assert in_columns_of(moved, logits_BLV) is logits_BLV  # no copy of logits that are in place

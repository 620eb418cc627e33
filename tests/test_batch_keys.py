"""What the keys of a batch say of their values."""

import pytest
import torch

from gkd_trainer.batch_keys import MEDIA_INPUTS, PER_LABEL, PER_SAMPLE, PER_TOKEN, SIDE_TENSORS, may_be_per_token
from gkd_trainer.types import TokenBatch


def test_no_side_tensor_is_taken_for_values_per_token_or_for_a_model_input():
    sides = {name: torch.zeros(2, 3, dtype=torch.long) for name in SIDE_TENSORS}
    assert not any(may_be_per_token(name, value) for name, value in sides.items())
    batch = TokenBatch.from_inputs({"labels": torch.zeros(2, 3, dtype=torch.long), **sides})
    assert batch.model_inputs == {}


def test_a_key_is_per_token_or_per_sample_but_not_both():
    assert not PER_SAMPLE & (PER_TOKEN | PER_LABEL)
    assert MEDIA_INPUTS | SIDE_TENSORS.keys() <= PER_SAMPLE


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mrope_position_ids", torch.zeros(3, 2, 3), True),
        ("reward", torch.zeros(2), False),
        ("names", [["a", "b"], ["c", "d"]], False),
        ("pixel_values", torch.zeros(2, 3), False),
        ("token_type_ids", torch.zeros(2, 3), False),
    ],
)
def test_only_a_tensor_of_unknown_name_and_two_dimensions_may_be_per_token(name, value, expected):
    assert may_be_per_token(name, value) is expected

"""Keys of rows: integers of 64 bits, of any type, and nothing else."""

import re

import numpy as np
import pytest
import torch

from gkd_trainer.data.keys import checked_key
from gkd_trainer.errors import GKDDataError


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), np.int32(5), torch.tensor(5)])
def test_integers_of_any_type_are_keys(value):
    key = checked_key(value, "row 0")
    assert type(key) is int
    assert key == value


@pytest.mark.parametrize("value", [None, "5", 5.0, True, [5], 2**63, -(2**63) - 1])
def test_anything_but_an_integer_of_64_bits_is_refused_with_the_row_and_the_value(value):
    message = f"train: row 3: expected a 64-bit integer as row_key; got {value!r}: number the rows"
    with pytest.raises(GKDDataError, match=re.escape(message)):
        checked_key(value, "train: row 3")

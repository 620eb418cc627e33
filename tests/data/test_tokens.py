"""Rows that are already tokenised."""

import pickle

import numpy as np
import pytest

from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS
from gkd_trainer.data.tokens import RowDropped, RowTokens, held_tokens, lengths_of

X = IGNORE_INDEX


def test_a_row_keeps_the_prompt_that_an_earlier_preparation_gave_it():
    row = {"input_ids": [1, 2, 3], "labels": [X, X, 3], PROMPT_IDS: [1, 9]}
    assert held_tokens(row) == RowTokens([1, 2, 3], [X, X, 3], [1, 9])
    assert held_tokens({**row, PROMPT_IDS: None}).prompt_ids == []


def test_padding_is_removed_from_all_per_token_values():
    row = {"input_ids": [0, 1, 2], "labels": [X, X, 2], "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]}
    assert held_tokens(row) == RowTokens([1, 2], [X, 2], [], {"attention_mask": [1, 1], "position_ids": [0, 1]})


def test_labels_come_before_masks_and_other_columns_are_not_read():
    row = {"input_ids": [1, 2], "labels": [X, 2], "completion_mask": [1, 1], "topic": "any"}
    assert held_tokens(row) == RowTokens([1, 2], [X, 2], [], {"completion_mask": [1, 1]})


def test_arrays_become_lists_of_plain_integers():
    tokens = held_tokens({"input_ids": np.array([1, 2]), "attention_mask": np.array([1, 1])})
    assert {type(value) for values in (tokens.ids, tokens.labels, *tokens.per_token.values()) for value in values} == {
        int
    }


@pytest.mark.parametrize("name", ["input_ids", "labels", PROMPT_IDS])
@pytest.mark.parametrize("value", [["a"], [1.0], 3])
def test_anything_but_a_list_of_token_ids_is_dropped_by_its_column(name, value):
    with pytest.raises(RowDropped) as dropped:
        held_tokens({"input_ids": [1], "labels": [1], name: value})
    assert dropped.value.reason == f"{name} is not a list of token ids"


@pytest.mark.parametrize("name", ["input_ids", PROMPT_IDS])
def test_a_negative_token_id_drops_its_row(name):
    with pytest.raises(RowDropped, match=f"a negative token id in {name}"):
        held_tokens({"input_ids": [1, 2], "labels": [X, 2], name: [1, -200]})


def test_a_negative_label_drops_its_row_unless_it_marks_what_is_not_trained_on():
    assert held_tokens({"input_ids": [1, 2], "labels": [X, 2]}).labels == [X, 2]
    with pytest.raises(RowDropped, match="a negative label other than -100, which marks"):
        held_tokens({"input_ids": [1, 2], "labels": [-1, 2]})


def test_padding_may_have_any_id_and_label():
    row = {"input_ids": [-1, 1, 2], "labels": [-1, X, 2], "attention_mask": [0, 1, 1]}
    assert held_tokens(row).ids == [1, 2]


def test_a_verdict_passes_from_process_to_process():
    dropped = pickle.loads(pickle.dumps(RowDropped("too long", 7)))
    assert (dropped.reason, dropped.needed_length) == ("too long", 7)


def test_the_lengths_of_packed_samples_become_their_positions():
    row = {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": np.array([3, 2])}
    assert held_tokens(row).per_token == {"position_ids": [0, 1, 2, 0, 1]}
    assert held_tokens({**row, "position_ids": [0, 1, 2, 3, 4]}).per_token == {"position_ids": [0, 1, 2, 3, 4]}
    with pytest.raises(RowDropped, match="seq_lengths"):
        held_tokens({**row, "seq_lengths": 5})
    with pytest.raises(RowDropped, match="seq_lengths don't add up to the length of input_ids"):
        held_tokens({**row, "seq_lengths": [3, 1]})


def test_positions_give_the_lengths_of_their_samples():
    assert lengths_of([0, 1, 2, 0, 0, 1]) == [3, 1, 2]
    assert lengths_of([4, 5, 0]) == [2, 1]
    assert lengths_of([]) == []

"""The values passed between stages: which positions are scored, and a head's logits of hidden states."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY, PROMPT_IDS, ROW_KEY
from gkd_trainer.right_padding import in_columns_of, right_padded
from gkd_trainer.types import Completion, TokenBatch, prompt_length

X = IGNORE_INDEX


@pytest.mark.parametrize(
    ("labels", "length"),
    [
        ([X, X, X, 7, 8], 3),
        ([X, 5, 6, X, X, 7, 8], 5),  # two turns: the last one is completed
        ([X, X, 7, 8, X, X], 2),  # a newline after the trained turn
        ([X, X, X], 3),  # a prompt alone
        ([5, 6, 7], 0),  # no prompt
        ([5, X, 7], 2),
        ([5, X, X], 0),
        ([], 0),
    ],
)
def test_the_prompt_is_all_before_the_last_trained_run(labels, length):
    assert prompt_length(labels) == length


def labelled_batch():
    labels_BL = torch.tensor([[X, X, 5, 6, X], [9, X, X, 7, 8], [X, X, X, X, X]])
    return TokenBatch({"input_ids": labels_BL.clamp_min(0)}, labels_BL, torch.tensor([True, False, False]))


def test_position_i_is_scored_where_token_i_plus_1_is_trained_on():
    batch = labelled_batch()
    # The first token of row 1 has no position that predicts it.
    assert batch.is_scored_BL.tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False] * 5,
    ]
    assert batch.targets_N.tolist() == [5, 6, 7, 8]
    assert batch.rows_N.tolist() == [0, 0, 1, 1]
    assert batch.columns_N.tolist() == [1, 2, 2, 3]


def test_targets_and_rows_are_in_the_order_of_the_scored_positions():
    generator = torch.Generator().manual_seed(0)
    labels_BL = torch.randint(0, 50, (7, 11), generator=generator)
    labels_BL[torch.rand(7, 11, generator=generator) < 0.5] = X
    batch = TokenBatch({}, labels_BL, torch.zeros(7, dtype=torch.bool))
    expected = [
        (row, position, labels_BL[row, position + 1].item())
        for row in range(7)
        for position in range(10)
        if labels_BL[row, position + 1] != X
    ]
    assert batch.is_scored_BL.nonzero().tolist() == [[row, position] for row, position, _ in expected]
    assert batch.targets_N.tolist() == [target for *_, target in expected]
    assert batch.rows_N.tolist() == [row for row, *_ in expected]


def test_where_labels_are_not_shifted_position_i_is_scored_on_token_i():
    batch = replace(labelled_batch(), label_offset=0)
    assert batch.is_scored_BL.tolist() == (batch.labels_BL != X).tolist()
    assert batch.targets_N.tolist() == [5, 6, 9, 7, 8]  # the first token of row 1 too
    assert batch.rows_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.columns_N.tolist() == [2, 3, 0, 3, 4]


def test_a_batch_is_built_for_the_offset_that_it_is_given():
    labels_BL = torch.tensor([[4, 5, X]])
    inputs = {"input_ids": labels_BL.clamp_min(0), "labels": labels_BL}
    assert TokenBatch.from_inputs(inputs).targets_N.tolist() == [5]
    assert TokenBatch.from_inputs(inputs, label_offset=0).targets_N.tolist() == [4, 5]


@pytest.mark.parametrize("label_offset", [0, 1])
def test_rows_and_columns_select_what_the_mask_of_scored_positions_selects(label_offset):
    batch = replace(labelled_batch(), label_offset=label_offset)
    values_BLH = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(values_BLH[batch.rows_N, batch.columns_N], values_BLH[batch.is_scored_BL])
    assert batch.n_scored == batch.is_scored_BL.sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_tensors_of_the_data_set_are_at_hand_by_name(side):
    mask_BL = torch.tensor([[1, 1, 1], [0, 1, 1] if side == "left" else [1, 1, 0]])
    ids_BL = torch.tensor([[4, 5, 6], [7, 8, 9]])
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": ids_BL, ROW_KEY: torch.tensor([7, 8])}
    batch = TokenBatch.from_inputs({**inputs, IS_ON_POLICY: torch.tensor([True, False])})
    assert batch.side.keys() == {ROW_KEY}
    assert batch.side[ROW_KEY].tolist() == [7, 8]
    assert TokenBatch.from_inputs({"input_ids": ids_BL, "labels": ids_BL}).side == {}


def test_a_batch_sent_to_a_device_is_still_read_on_the_host():
    host = replace(labelled_batch(), side={ROW_KEY: torch.tensor([7, 8, 9])})
    moved = host.to(torch.device("meta"))
    assert {moved.labels_BL.device.type, moved.model_inputs["input_ids"].device.type} == {"meta"}
    assert moved.on_host is host
    assert (moved.n_scored, moved.rows_N.device.type, len(moved.targets_N)) == (4, "meta", 4)
    assert host.to(torch.device("cpu")) is host.on_host is host

    chosen = moved.of_samples([1, 2])
    assert (chosen.labels_BL.device.type, chosen.n_scored) == ("meta", 2)
    assert chosen.on_host.labels_BL.tolist() == host.labels_BL[1:].tolist()
    assert chosen.on_host.side[ROW_KEY].tolist() == [8, 9]

    marked = moved.with_side(ROW_KEY, torch.tensor([1, 2, 3]))
    assert marked.side[ROW_KEY].device.type == "meta"
    assert marked.on_host.side[ROW_KEY].tolist() == [1, 2, 3]
    assert moved.on_host.side[ROW_KEY].tolist() == [7, 8, 9]


def test_a_batch_sent_from_device_to_device_keeps_its_copy_on_the_host():
    host = labelled_batch()
    there = host.to(torch.device("meta"))
    elsewhere = replace(host).known_on_host(host)
    assert there.to(torch.device("meta")) is there
    assert elsewhere.to(torch.device("meta")).on_host is host


def test_a_changed_batch_does_not_keep_its_copy_on_the_host():
    moved = labelled_batch().to(torch.device("meta"))
    changed = replace(moved, labels_BL=moved.labels_BL + 1)
    with pytest.raises(NotImplementedError, match="no data"):
        changed.n_scored  # noqa: B018


@pytest.mark.parametrize("label_offset", [0, 1])
def test_nothing_is_scored_in_a_batch_of_no_tokens(label_offset):
    batch = TokenBatch({}, torch.empty(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.bool), label_offset)
    assert batch.is_scored_BL.shape == (2, 0)
    assert batch.n_scored == len(batch.targets_N) == 0


@pytest.mark.parametrize("is_trained", [[], [True], [True, False, True]])
def test_is_trained_has_a_value_for_every_token_or_is_none(is_trained):
    Completion([5, 6], is_finished=True)
    Completion([5, 6], is_finished=True, is_trained=[False, True])
    with pytest.raises(ValueError, match=rf"each of the completion's 2 tokens; got {len(is_trained)}"):
        Completion([5, 6], is_finished=True, is_trained=is_trained)


@pytest.mark.parametrize("log_probs", [[], [-0.5], [-0.5] * 3])
def test_log_probs_are_one_per_token_and_do_not_tell_completions_apart(log_probs):
    assert Completion([5, 6], True, log_probs=[-0.5, -1.0]) == Completion([5, 6], True)
    with pytest.raises(ValueError, match=rf"log_probs must have .* 2 tokens; got {len(log_probs)}"):
        Completion([5, 6], is_finished=True, log_probs=log_probs)


def test_only_what_a_forward_takes_is_model_input():
    inputs = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "position_ids": torch.arange(3).expand(2, 3),
        "labels": torch.full((2, 3), X),
        "prompts": torch.ones(2, 2, dtype=torch.long),
        "prompt_attention_mask": torch.ones(2, 2, dtype=torch.long),
        PROMPT_IDS: torch.ones(2, 2, dtype=torch.long),
        ROW_KEY: torch.tensor([7, 8]),
        "byte_offsets": torch.ones(2, 3, 2, dtype=torch.long),
        "completion_mask": torch.ones(2, 3, dtype=torch.long),
        "assistant_masks": torch.ones(2, 3, dtype=torch.long),
        IS_ON_POLICY: torch.tensor([True, False]),
    }
    batch = TokenBatch.from_inputs(inputs)
    assert set(batch.model_inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert batch.is_on_policy_B.tolist() == [True, False]


def encoder_decoder_inputs():
    """A batch padded on the left whose labels happen to be as long as what the encoder reads."""
    return {
        "input_ids": torch.tensor([[0, 0, 7, 8], [9, 7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "labels": torch.tensor([[5, 6, 2, X], [5, X, 6, 2]]),
        "decoder_input_ids": torch.tensor([[0, 5, 6, 2], [0, 5, 4, 6]]),
    }


def test_decoder_inputs_show_that_labels_are_not_shifted():
    batch = TokenBatch.from_inputs(encoder_decoder_inputs())
    assert batch.label_offset == 0
    assert batch.targets_N.tolist() == [5, 6, 2, 5, 6, 2]
    assert batch.columns_N.tolist() == [0, 1, 2, 0, 2, 3]
    assert set(batch.model_inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_only_the_encoders_padding_moves_in_a_batch_with_decoder_inputs():
    inputs = encoder_decoder_inputs()
    moved = right_padded(inputs)
    assert moved["input_ids"].tolist() == [[7, 8, 0, 0], [9, 7, 8, 9]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert moved["labels"] is inputs["labels"]
    assert moved["decoder_input_ids"] is inputs["decoder_input_ids"]
    assert in_columns_of(inputs, inputs["labels"]) is inputs["labels"]


def test_no_padding_position_is_scored_for_the_first_token():
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    batch = TokenBatch.from_inputs({**inputs, "labels": torch.tensor([[X, X, 5, 6]])})
    assert batch.targets_N.tolist() == [6]
    assert batch.model_inputs["input_ids"].tolist() == [[5, 6, 0, 0]]


def test_without_a_mark_no_sample_is_on_policy():
    batch = TokenBatch.from_inputs({"input_ids": torch.ones(2, 3), "labels": torch.full((2, 3), X)})
    assert batch.is_on_policy_B.tolist() == [False, False]


def batch_of_three(**inputs):
    ids_BL = torch.arange(12).reshape(3, 4)
    labels_BL = ids_BL.masked_fill(torch.arange(4) < torch.tensor([[1], [3], [2]]), X)
    return TokenBatch.from_inputs(
        {"input_ids": ids_BL, "labels": labels_BL, ROW_KEY: torch.tensor([7, 8, 9]), **inputs}
    )


def test_some_samples_of_a_batch_keep_their_values_and_columns():
    position_ids = torch.arange(24).reshape(2, 3, 4)  # several kinds of positions
    batch = batch_of_three(position_ids=position_ids, use_cache=False)
    part = batch.of_samples([0, 2])
    assert torch.equal(part.model_inputs["input_ids"], batch.model_inputs["input_ids"][[0, 2]])
    assert torch.equal(part.model_inputs["position_ids"], position_ids[:, [0, 2]])
    assert part.model_inputs["use_cache"] is False
    assert part.side[ROW_KEY].tolist() == [7, 9]
    assert part.targets_N.tolist() == [1, 2, 3, 10, 11]
    assert part.label_offset == batch.label_offset


def test_samples_of_a_batch_with_values_of_unknown_samples_stay_beside_masked_ones():
    batch = batch_of_three(pixel_values=torch.zeros(5, 2))
    part = batch.of_samples([0, 2])
    assert part.model_inputs is batch.model_inputs
    assert part.labels_BL[1].tolist() == [X] * 4
    assert part.targets_N.tolist() == [1, 2, 3, 10, 11]
    none = batch.of_samples([])
    assert list(none.model_inputs) == ["input_ids"]
    assert none.labels_BL.shape == (0, 4)
    assert none.n_scored == 0

"""The λ draw, the sampling seeds, and completions in place of the data's."""

import math
import random

import numpy as np
import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY, PER_TOKEN, PROMPT_IDS, ROW_KEY, SAMPLING_LOG_PROBS
from gkd_trainer.errors import GKDDataError
from gkd_trainer.rollouts.mixing import (
    _EXTENDED,
    _LEFT_OUT,
    is_on_policy,
    lmbda_at,
    prompts_of,
    require_extendable,
    rows_of,
    sampling_seed,
    with_completions,
)
from gkd_trainer.types import Completion, Generated, TokenBatch

X = IGNORE_INDEX
PAD = 0


def draws(lmbda, positions, seed=42, step=0, granularity="sample"):
    return [is_on_policy(lmbda, granularity, seed, step, position) for position in positions]


@pytest.mark.parametrize("granularity", ["sample", "batch"])
@pytest.mark.parametrize(("lmbda", "expected"), [(0.0, False), (1.0, True)])
def test_lambda_0_never_and_lambda_1_always_draws_on_policy(lmbda, expected, granularity):
    for step in range(100):
        assert set(draws(lmbda, range(10), step=step, granularity=granularity)) == {expected}


@pytest.mark.parametrize("lmbda", [0.1, 0.5, 0.8])
def test_the_share_of_on_policy_samples_is_lambda(lmbda):
    drawn = [draw for step in range(100) for draw in draws(lmbda, range(40), step=step)]
    assert abs(np.mean(drawn) - lmbda) < 0.03  # 4 standard deviations of 4,000 draws at 0.5


@pytest.mark.parametrize("lmbda", [0.2, 0.7])
def test_the_share_of_on_policy_steps_is_lambda(lmbda):
    drawn = [draws(lmbda, [0], step=step, granularity="batch")[0] for step in range(4000)]
    assert abs(np.mean(drawn) - lmbda) < 0.03


def test_granularity_batch_shares_one_draw_in_a_step():
    steps = [set(draws(0.5, range(64), step=step, granularity="batch")) for step in range(20)]
    assert all(len(drawn) == 1 for drawn in steps)
    assert {drawn.pop() for drawn in steps} == {True, False}


def test_granularity_sample_draws_each_position_by_itself():
    assert all(len(set(draws(0.5, range(64), step=step))) == 2 for step in range(20))


def test_the_draw_depends_only_on_seed_step_and_position():
    first = draws(0.5, range(64), seed=1, step=3)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert draws(0.5, range(64), seed=1, step=3) == first
    assert draws(0.5, reversed(range(64)), seed=1, step=3) == first[::-1]
    assert draws(0.5, range(64), seed=2, step=3) != first
    assert draws(0.5, range(64), seed=1, step=4) != first


def test_a_larger_lambda_only_adds_on_policy_samples():
    smaller, larger = draws(0.3, range(500)), draws(0.6, range(500))
    assert all(b for a, b in zip(smaller, larger, strict=True) if a)
    assert sum(larger) > sum(smaller)


def test_sampling_seeds_differ_by_seed_step_and_position():
    keys = [(seed, step, position) for seed in range(5) for step in range(20) for position in range(20)]
    seeds = {sampling_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(1, 2, 3) == sampling_seed(1, 2, 3)


def test_the_global_random_states_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    draws(0.5, range(20))
    sampling_seed(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_a_constant_lambda_stays():
    assert [lmbda_at(step, 10, 0.3, None, "constant") for step in (0, 5, 9)] == [0.3] * 3


def test_a_linear_lambda_goes_from_the_first_step_to_the_last():
    values = [lmbda_at(step, 11, 0.2, 0.8, "linear") for step in range(11)]
    assert values == pytest.approx([0.2 + 0.6 * step / 10 for step in range(11)])
    assert [lmbda_at(step, 5, 1.0, 0.0, "linear") for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_linear_lambda_over_one_step_is_its_start():
    assert lmbda_at(0, 1, 0.2, 0.8, "linear") == 0.2
    assert lmbda_at(0, 0, 0.2, 0.8, "linear") == 0.2


def test_a_linear_lambda_never_passes_its_end():
    assert lmbda_at(99, 11, 0.2, 0.8, "linear") == pytest.approx(0.8)


def batch_of(ids, mask, labels, **others):
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        **others,
    }


def generated(row, prompt, ids, *, is_finished=True, is_on_policy=True, is_trained=None):
    return {row: Generated(prompt, Completion(ids, is_finished, is_trained), is_on_policy)}


RIGHT = batch_of(
    ids=[[11, 12, 13, 14, 15], [21, 22, 23, PAD, PAD]],
    mask=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
    labels=[[X, X, 13, 14, 15], [X, 22, 23, X, X]],
)
LEFT = batch_of(
    ids=[[11, 12, 13, 14, 15], [PAD, PAD, 21, 22, 23]],
    mask=[[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    labels=[[X, X, 13, 14, 15], [X, X, X, 22, 23]],
)


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
def test_rows_come_without_their_padding(inputs):
    assert rows_of(inputs) == [
        ([11, 12, 13, 14, 15], [X, X, 13, 14, 15]),
        ([21, 22, 23], [X, 22, 23]),
    ]


def test_rows_without_a_mask_have_no_padding():
    inputs = {key: RIGHT[key] for key in ("input_ids", "labels")}
    assert rows_of(inputs)[1] == ([21, 22, 23, PAD, PAD], [X, 22, 23, X, X])


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([X, X, 3, 4], [1, 2]),
        ([X, 2, X, 4], [1, 2, 3]),  # the earlier turn is part of the prompt
        ([X, X, X, X], [1, 2, 3, 4]),
        ([1, 2, 3, 4], []),
        ([X, 2, X, X], [1]),
    ],
)
def test_the_prompt_of_a_sample_is_all_before_its_last_trained_run(labels, prompt):
    assert prompts_of(batch_of([[1, 2, 3, 4]], [[1] * 4], [labels])) == [prompt]


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
def test_a_sample_with_its_own_prompt_is_completed_from_that(inputs):
    inputs = {**inputs, PROMPT_IDS: torch.tensor([[X, X, X], [21, 99, X]])}
    assert prompts_of(inputs) == [[11, 12], [21, 99]]
    first = generated(0, prompt=[11, 12], ids=[9])
    mixed = with_completions(inputs, {**first, **generated(1, prompt=[21, 99], ids=[91])}, PAD)
    assert mixed["input_ids"].tolist() == [[11, 12, 9], [21, 99, 91]]
    assert mixed["labels"].tolist() == [[X, X, 9], [X, X, 91]]


def test_a_completed_sample_has_no_prompt_of_its_own_any_more_and_the_others_keep_theirs():
    inputs = {**RIGHT, PROMPT_IDS: torch.tensor([[11, 12, 13, 14], [21, 99, X, X]])}
    mixed = with_completions(inputs, generated(1, prompt=[21, 99], ids=[91, 2]), PAD)
    assert prompts_of(mixed) == [[11, 12, 13, 14], [21, 99]]
    assert mixed[PROMPT_IDS].tolist() == [[11, 12, 13, 14], [X] * 4]
    assert prompts_of(inputs) == [[11, 12, 13, 14], [21, 99]]  # the batch before is as it was


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("is_on_policy", [True, False], ids=["the student's", "the teacher's"])
def test_a_completed_sample_keeps_its_key(inputs, is_on_policy):
    inputs = {**inputs, ROW_KEY: torch.tensor([2**60, 5])}
    mixed = with_completions(inputs, generated(1, [21], [91, 2], is_on_policy=is_on_policy), PAD)
    assert mixed[ROW_KEY].tolist() == [2**60, 5]
    assert mixed[IS_ON_POLICY].tolist() == [False, is_on_policy]


@pytest.mark.parametrize("is_on_policy", [True, False], ids=["the student's", "the teacher's"])
def test_a_sample_that_is_left_as_it_is_keeps_its_mark(is_on_policy):
    inputs = {**RIGHT, IS_ON_POLICY: torch.tensor([True, not is_on_policy])}
    assert with_completions(inputs, {}, PAD)[IS_ON_POLICY].tolist() == [True, not is_on_policy]
    mixed = with_completions(inputs, generated(1, [21], [91, 2], is_on_policy=is_on_policy), PAD)
    assert mixed[IS_ON_POLICY].tolist() == [True, is_on_policy]
    assert inputs[IS_ON_POLICY].tolist() == [True, not is_on_policy]


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
def test_only_the_tokens_that_a_completion_marks_are_trained_on(inputs):
    masks = {"completion_mask": inputs["attention_mask"].clone(), "assistant_masks": inputs["attention_mask"].clone()}
    completion = generated(1, [21], [91, 92, 93, 2], is_trained=[True, False, False, True])
    mixed = with_completions({**inputs, **masks}, completion, PAD)
    assert mixed["input_ids"][1].tolist() == [21, 91, 92, 93, 2]
    assert mixed["attention_mask"][1].tolist() == [1, 1, 1, 1, 1]
    assert mixed["labels"].tolist() == [[X, X, 13, 14, 15], [X, 91, X, X, 2]]
    for name in masks:
        assert mixed[name].tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize("is_trained", [None, [True, True]])
def test_a_completion_without_is_trained_is_all_trained_on(is_trained):
    mixed = with_completions(RIGHT, generated(0, [11], [8, 9], is_trained=is_trained), PAD)
    assert mixed["labels"][0].tolist() == [X, 8, 9]


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
def test_an_off_policy_and_an_on_policy_sample_sit_in_one_batch(inputs):
    mixed = with_completions(inputs, generated(1, [21], [91, 92, 93, 94, 95, 2]), pad_token_id=7)
    assert mixed["input_ids"].tolist() == [[11, 12, 13, 14, 15, 7, 7], [21, 91, 92, 93, 94, 95, 2]]
    assert mixed["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert mixed["labels"].tolist() == [[X, X, 13, 14, 15, X, X], [X, 91, 92, 93, 94, 95, 2]]
    assert mixed[IS_ON_POLICY].tolist() == [False, True]
    assert {value.dtype for key, value in mixed.items() if key != IS_ON_POLICY} == {torch.long}


def completed(inputs, completions):
    """Return a batch whose rows get completions of [ids, log-probs, is_on_policy], and its log-probs."""
    items = {
        row: Generated([21], Completion(ids, True, log_probs=log_probs), is_on_policy)
        for row, (ids, log_probs, is_on_policy) in completions.items()
    }
    mixed = with_completions(inputs, items, PAD)
    return mixed, mixed.get(SAMPLING_LOG_PROBS)


def shown(values_BL):
    return [[None if math.isnan(value) else value for value in values] for values in values_BL.tolist()]


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
def test_log_probs_of_the_student_s_completions_stand_in_the_columns_of_their_labels(inputs):
    mixed, log_probs_BL = completed(inputs, {1: ([91, 92, 2], [-0.25, -0.5, -1.0], True)})
    assert shown(log_probs_BL) == [[None] * 5, [None, -0.25, -0.5, -1.0, None]]
    assert mixed["labels"][1].tolist() == [X, 91, 92, 2, X]
    batch = TokenBatch.from_inputs(mixed)
    assert batch.sampling_log_probs_N.isnan().tolist() == [True] * 3 + [False] * 3
    assert batch.sampling_log_probs_N[3:].tolist() == [-0.25, -0.5, -1.0]
    assert batch.of_samples([1]).sampling_log_probs_N.tolist() == [-0.25, -0.5, -1.0]
    assert SAMPLING_LOG_PROBS not in batch.model_inputs


@pytest.mark.parametrize(
    "completion",
    [([91, 2], None, True), ([], [], True), ([91, 2], [-1.0, -1.0], False)],
    ids=["none", "empty", "the teacher's"],
)
def test_a_batch_without_log_probs_of_the_student_has_none(completion):
    mixed, log_probs_BL = completed(RIGHT, {0: completion})
    assert log_probs_BL is None
    assert TokenBatch.from_inputs(mixed).sampling_log_probs_N is None


def test_log_probs_of_an_earlier_completion_go_with_it():
    mixed, _ = completed(RIGHT, {1: ([91, 92, 93, 94, 2], [-1.0] * 5, True)})
    again, log_probs_BL = completed(mixed, {0: ([81, 2], [-2.0, -3.0], True)})
    assert shown(log_probs_BL) == [[None, -2.0, -3.0, None, None, None], [None] * 6]
    assert SAMPLING_LOG_PROBS not in completed(again, {0: ([71, 2], None, True)})[0]


def test_only_the_completion_is_trained_on_where_earlier_turns_were():
    inputs = batch_of([[1, 2, 3, 4, 5, 6]], [[1] * 6], [[X, 2, X, X, 5, 6]])
    mixed = with_completions(inputs, generated(0, [1, 2, 3, 4], [8, 9], is_finished=False), PAD)
    assert mixed["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9]]
    assert mixed["labels"].tolist() == [[X, X, X, X, 8, 9]]


def test_a_trained_end_of_sequence_survives_even_if_it_is_the_pad_token():
    mixed = with_completions(RIGHT, generated(1, [21], [91, 2]), pad_token_id=2)
    assert mixed["labels"][1].tolist() == [X, 91, 2, X, X]
    assert mixed["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]


def test_a_shorter_completion_shortens_the_batch():
    mixed = with_completions(RIGHT, generated(0, [11, 12], [9]), PAD)
    assert mixed["input_ids"].tolist() == [[11, 12, 9], [21, 22, 23]]


@pytest.mark.parametrize("inputs", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize(
    ("name", "values", "of_prompt", "of_completion"),
    [
        ("position_ids", [0, 1, 2, 3, 4], [0], [1, 2, 3, 4, 5, 6]),
        ("position_ids", [7, 8, 9, 10, 11], [0], [1, 2, 3, 4, 5, 6]),  # as left padding counts them
        ("token_type_ids", [0, 0, 0, 0, 0], [0], [0] * 6),
        ("token_type_ids", [0, 0, 1, 1, 1], [0], [1] * 6),
        ("mm_token_type_ids", [1, 0, 0, 0, 0], [1], [0] * 6),
        ("completion_mask", [0, 1, 1, 1, 1], [0], [1] * 6),
        ("assistant_masks", [1, 0, 1, 0, 1], [0], [1] * 6),
    ],
)
def test_values_per_token_stay_with_their_rows_and_are_extended_in_completions(
    inputs, name, values, of_prompt, of_completion
):
    values_BL = torch.zeros(2, 5, dtype=torch.long)
    for row, own in enumerate([[5, 4, 3, 2, 1], values[:3]]):  # of the second row, padded, only three are real
        values_BL[row][inputs["attention_mask"][row].bool()] = torch.tensor(own)
    mixed = with_completions({**inputs, name: values_BL}, generated(1, [21], [91, 92, 93, 94, 95, 2]), PAD)
    assert mixed[name].tolist() == [[5, 4, 3, 2, 1, 0, 0], of_prompt + of_completion]
    assert mixed["input_ids"].shape == mixed[name].shape


def test_types_of_one_kind_suit_a_prompt_of_its_own():
    for name, kind in (("token_type_ids", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        inputs = {**RIGHT, name: torch.full((2, 5), kind)}
        mixed = with_completions(inputs, generated(1, [98, 99], [91]), PAD)
        assert mixed[name][1].tolist() == [kind] * 3 + [0] * 2


def test_a_mask_keeps_its_type_and_what_it_hides_inside_of_a_row():
    inputs = {**RIGHT, "attention_mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)}
    mixed = with_completions(inputs, generated(1, [21], [91, 2]), PAD)
    assert mixed["input_ids"][0].tolist() == [11, 12, 13, 14, 15]
    assert mixed["attention_mask"][0].tolist() == [True, False, True, True, True]
    assert mixed["labels"][0].tolist() == RIGHT["labels"][0].tolist()


def test_values_per_sample_or_image_are_kept():
    inputs = {
        **RIGHT,
        "row_weight": torch.tensor([0.5, 1.5]),
        "pixel_values": torch.zeros(2, 5, 3),  # by name, whatever its shape
        "image_grid_thw": torch.ones(1, 3),
        "prompts": torch.ones(2, 5),
        "scalar": torch.tensor(3.0),
        "names": ["a", "b"],
        "nothing": None,
    }
    mixed = with_completions(inputs, generated(1, [21], [9]), PAD)
    for key in inputs.keys() - RIGHT.keys():
        assert mixed[key] is inputs[key]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("token_embeddings", torch.zeros(2, 5, 3), r"token_embeddings \[2, 5, 3\], which may have one value per token"),
        ("special_mask", torch.zeros(2, 5), r"special_mask \[2, 5\], which may have one value per token"),
        ("attention_bias", torch.zeros(2, 1, 5, 5), r"attention_bias \[2, 1, 5, 5\], which may have one value"),
        ("mrope_position_ids", torch.zeros(3, 2, 5), r"mrope_position_ids \[3, 2, 5\], which may have one value per"),
        # Refused before a batch comes whose length is 3.
        ("sample_features", torch.zeros(2, 3), r"sample_features \[2, 3\], which may have one value per token"),
        ("position_ids", torch.zeros(3, 2, 5), r"position_ids \[3, 2, 5\].*one value per token of input_ids \[2, 5\]"),
        ("attention_mask", torch.ones(2, 1, 5, 5), r"attention_mask \[2, 1, 5, 5\].*one value per token"),
        ("cu_seq_lens_q", torch.tensor([0, 5]), r"cu_seq_lens_q \[2\].*joined in one row"),
        ("max_length_k", 5, r"max_length_k, which.*joined in one row"),
    ],
)
def test_values_that_can_not_be_extended_are_refused_by_name(name, value, reason):
    with pytest.raises(GKDDataError, match=rf"{reason}.*Make it return no {name}, or generate nothing"):
        require_extendable({**RIGHT, name: value})
    require_extendable(RIGHT)


def test_all_that_is_known_to_be_per_token_is_extended_or_left_out():
    assert _EXTENDED.keys() | _LEFT_OUT == PER_TOKEN


def test_the_byte_offsets_of_trls_collator_are_left_out_if_tokens_change():
    inputs = {**RIGHT, "byte_offsets": torch.zeros(2, 5, 2)}
    assert with_completions(inputs, generated(1, [21], [9]), PAD).keys() == {*RIGHT, IS_ON_POLICY}


def test_positions_of_packed_samples_are_refused_if_one_must_be_completed():
    inputs = {**RIGHT, "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]])}
    with pytest.raises(GKDDataError, match=r"position_ids.*count up by one.*\[0, 1, 2, 0, 1\].*its own row"):
        with_completions(inputs, generated(0, [11, 12], [9]), PAD)
    mixed = with_completions(inputs, generated(1, [21], [9]), PAD)
    assert mixed["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]


def test_an_image_behind_the_prompt_is_refused():
    inputs = {**RIGHT, "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 0], [0] * 5])}
    with pytest.raises(GKDDataError, match=r"mm_token_type_ids.*after the prompt.*before the last assistant turn"):
        with_completions(inputs, generated(0, [11, 12], [9]), PAD)


def test_types_of_other_tokens_than_the_prompts_are_refused():
    inputs = {**RIGHT, "mm_token_type_ids": torch.tensor([[1, 0, 0, 0, 0], [0] * 5])}
    with pytest.raises(GKDDataError, match=r"mm_token_type_ids.*other tokens than its prompt's; got \[1, 0, 0, 0, 0\]"):
        with_completions(inputs, generated(0, [98, 99], [9]), PAD)


def test_the_tokens_of_an_own_prompt_have_the_types_of_equal_tokens_in_the_row():
    inputs = {**RIGHT, "mm_token_type_ids": torch.tensor([[0, 1, 0, 0, 0], [0] * 5])}
    image = int(RIGHT["input_ids"][0, 1])
    mixed = with_completions(inputs, generated(0, [98, 99, image], [9]), PAD)
    assert mixed["mm_token_type_ids"][0].tolist()[:4] == [0, 0, 1, 0]


def test_a_batch_without_completions_is_marked_and_else_unchanged():
    inputs = {**LEFT, "position_ids": torch.arange(5).expand(2, 5)}
    marked = with_completions(inputs, {}, PAD)
    assert marked.pop(IS_ON_POLICY).tolist() == [False, False]
    assert marked.keys() == inputs.keys()
    assert all(marked[key] is inputs[key] for key in inputs)


def test_the_given_batch_is_not_changed():
    before = {key: value.clone() for key, value in RIGHT.items()}
    with_completions(RIGHT, generated(0, [11, 12], [9]), PAD)
    assert RIGHT.keys() == before.keys()
    assert all(torch.equal(RIGHT[key], before[key]) for key in before)


def test_a_completion_of_the_teacher_is_not_marked_on_policy():
    of_teacher = generated(0, [11, 12], [8], is_on_policy=False)
    mixed = with_completions(RIGHT, {**of_teacher, **generated(1, [21], [9])}, PAD)
    assert mixed[IS_ON_POLICY].tolist() == [False, True]
    assert mixed["labels"].tolist() == [[X, X, 8], [X, 9, X]]


def decoder_batch(**others):
    """A batch of an encoder-decoder, padded on the left where its encoder reads."""
    return {
        "input_ids": torch.tensor([[PAD, 11, 12], [21, 22, 23], [PAD, PAD, 31]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "labels": torch.tensor([[13, 14, 2, X], [24, 2, X, X], [X, X, X, X]]),
        "decoder_input_ids": torch.tensor([[7, 13, 14, 2], [7, 24, 2, 7], [7, 2, PAD, PAD]]),
        **others,
    }


def test_all_that_an_encoder_reads_is_the_prompt():
    own = torch.tensor([[99], [99], [99]])
    assert (
        prompts_of(decoder_batch()) == prompts_of(decoder_batch(**{PROMPT_IDS: own})) == [[11, 12], [21, 22, 23], [31]]
    )
    without_mask = {name: value for name, value in decoder_batch().items() if name != "attention_mask"}
    assert prompts_of(without_mask)[0] == [PAD, 11, 12]


def test_a_completion_replaces_labels_and_decoder_inputs_behind_the_start_token():
    inputs = decoder_batch(decoder_attention_mask=torch.ones(3, 4, dtype=torch.long), row_key=torch.arange(3))
    generated = {
        0: Generated([11, 12], Completion([41, 42, 43, 44, 45], is_finished=False, is_trained=[0, 1, 1, 1, 1]), True),
        2: Generated([31], Completion([51, 2], is_finished=True), False),
    }
    mixed = with_completions(inputs, generated, PAD)
    assert mixed["labels"].tolist() == [[X, 42, 43, 44, 45], [24, 2, X, X, X], [51, 2, X, X, X]]
    # The decoder reads also those tokens that are not trained on.
    assert mixed["decoder_input_ids"].tolist() == [
        [7, 41, 42, 43, 44],
        [7, 24, 2, 7, PAD],
        [7, 51, PAD, PAD, PAD],
    ]
    assert mixed["decoder_attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert mixed["input_ids"] is inputs["input_ids"]
    assert mixed["attention_mask"] is inputs["attention_mask"]
    assert mixed["row_key"] is inputs["row_key"]
    assert mixed[IS_ON_POLICY].tolist() == [True, False, False]
    assert with_completions(inputs, {}, PAD)["labels"] is inputs["labels"]


def test_log_probs_of_a_decoder_s_completion_stand_in_the_columns_of_its_labels():
    completion = Completion([41, 42, 2], True, is_trained=[0, 1, 1], log_probs=[-1.0, -2.0, -3.0])
    mixed = with_completions(decoder_batch(), {0: Generated([11, 12], completion, True)}, PAD)
    assert shown(mixed[SAMPLING_LOG_PROBS])[0] == [-1.0, -2.0, -3.0, None]
    assert TokenBatch.from_inputs(mixed).sampling_log_probs_N[:2].tolist() == [-2.0, -3.0]


def test_an_empty_completion_of_a_decoder_trains_on_nothing():
    generated = {row: Generated([11], Completion([], is_finished=False), True) for row in range(3)}
    mixed = with_completions(decoder_batch(), generated, PAD)
    assert mixed["labels"].tolist() == [[X]] * 3
    assert mixed["decoder_input_ids"].tolist() == [[7]] * 3


def test_values_of_an_encoder_stay_and_unknown_ones_of_a_decoder_are_refused():
    require_extendable(decoder_batch(embeddings=torch.zeros(3, 3, 2), position_ids=torch.zeros(3, 3)))
    with pytest.raises(GKDDataError, match=r"returned decoder_position_ids \[3, 4\], which belongs to the decoder's"):
        require_extendable(decoder_batch(decoder_position_ids=torch.zeros(3, 4)))
    with pytest.raises(
        GKDDataError, match=r"decoder_input_ids \[3, 5\], which does not have one value per label \[3, 4\]"
    ):
        require_extendable(decoder_batch(decoder_input_ids=torch.zeros(3, 5)))

"""Rows cut to fit, and each bound that drops one."""

import pytest

from gkd_trainer.data.rules import fitted, fitted_pair
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.data.tokens import RowDropped, RowTokens

ROW = RowTokens([1, 2, 3, 4], [-100, -100, -100, 4])


def fit(tokens, rules, teacher_ids=()):
    return fitted(tokens, [*teacher_ids], rules, TeacherPrompts(None), None)


def fit_pair(tokens, rules):
    return fitted_pair(tokens, [], rules, TeacherPrompts(None, is_encoder_decoder=True))


def reason(fit, tokens, rules):
    with pytest.raises(RowDropped) as dropped:
        fit(tokens, rules)
    return dropped.value.reason, dropped.value.needed_length


def test_a_row_whose_completion_is_entirely_cut_off_is_dropped(rules):
    assert fit(ROW, rules(max_length=4)).labels == [-100, -100, -100, 4]
    assert reason(fit, ROW, rules(max_length=3)) == ("no trained token within max_length (3)", 4)


def test_a_prompt_that_leaves_no_room_for_a_completion_is_dropped(rules):
    bound = {"max_length": 10, "is_generating": True}
    assert fit(ROW, rules(**bound, max_new_tokens=7)).n_prompt == 3
    expected = ("prompt longer than max_length - max_new_tokens (10 - 8)", 11)
    assert reason(fit, ROW, rules(**bound, max_new_tokens=8)) == expected


def test_a_prompt_may_fill_the_length_if_nothing_is_generated(rules):
    assert fit(ROW, rules(max_length=4, max_new_tokens=8)).n_prompt == 3


def test_a_row_is_cut_with_its_columns_and_says_so_unless_its_completion_is_always_generated(rules, on_policy):
    tokens = RowTokens([1, 2, 3, 4], [-100, 2, 3, 4], per_token={"position_ids": [0, 1, 2, 3]})
    cut = fit(tokens, rules(max_length=2))
    assert (cut.input_ids, cut.labels, cut.per_token, cut.is_cut) == ([1, 2], [-100, 2], {"position_ids": [0, 1]}, True)
    assert not fit(tokens, rules(max_length=4)).is_cut
    assert not fit(tokens, on_policy(max_length=3, max_new_tokens=2)).is_cut


def test_a_token_beyond_the_models_drops_the_row_wherever_it_is(rules):
    expected = ("a token id beyond the models' 4 tokens", 0)
    assert reason(fit, ROW, rules(vocab_size=4)) == expected
    in_prompt = RowTokens([1, 2], [-100, 2], prompt_ids=[4])
    assert reason(fit, in_prompt, rules(vocab_size=4)) == expected
    assert fit(in_prompt, rules(vocab_size=5)).prompt_ids == [4]


def test_a_row_without_a_prompt_is_dropped_if_all_completions_are_generated(on_policy):
    expected = ("no prompt, although lmbda=1.0 generates every completion", 0)
    assert reason(fit, RowTokens([1, 2], [1, 2]), on_policy()) == expected


def test_of_an_encoder_decoder_the_labels_are_cut_and_a_long_prompt_drops_the_row(rules):
    tokens = RowTokens([1, 2, 3], [4, 5, 6])
    cut = fit_pair(RowTokens([1, 2], [4, 5, 6]), rules(max_length=2))
    assert (cut.input_ids, cut.labels, cut.n_prompt, cut.is_cut) == ([1, 2], [4, 5], 2, True)
    assert reason(fit_pair, tokens, rules(max_length=2)) == ("prompt longer than max_length (2)", 3)
    assert not fit_pair(tokens, rules(max_length=3)).is_cut

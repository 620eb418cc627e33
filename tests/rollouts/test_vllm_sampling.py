"""The request of both vLLM engines, and valid completions."""

import math

import pytest

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.rollouts.vllm_sampling import (
    asking_for_log_probs,
    check_lengths,
    parse_completion,
    sampling_fields,
    transformers_options,
)
from gkd_trainer.types import Completion, Sampling

SAMPLING = Sampling(4, temperature=0.7)
STOP_IDS = [2, 5]


def test_every_field_is_given_and_padding_rows_are_biased_away():
    fields = sampling_fields(SAMPLING, STOP_IDS, range(10, 12))
    assert fields["temperature"] == 0.7
    assert fields["max_tokens"] == 4
    assert fields["min_p"] == 0.0
    assert fields["stop_token_ids"] == STOP_IDS
    assert fields["ignore_eos"] is True
    assert fields["logit_bias"] == {10: -100.0, 11: -100.0}
    assert "logit_bias" not in sampling_fields(SAMPLING, STOP_IDS, range(0))


def test_biases_of_the_user_stay_beside_those_of_padding_rows():
    sampling = Sampling(4, extra={"logit_bias": {"3": 1.5}, "presence_penalty": 0.5})
    fields = sampling_fields(sampling, STOP_IDS, range(10, 11))
    assert fields["logit_bias"] == {3: 1.5, 10: -100.0}
    assert fields["presence_penalty"] == 0.5


def test_log_probs_are_asked_for_unless_the_user_declines_or_nothing_is_drawn():
    def asked(temperature=1.0, **extra):
        fields = sampling_fields(Sampling(4, temperature=temperature, extra=extra), STOP_IDS, ())
        return asking_for_log_probs(fields).get("logprobs")

    assert asked() == 0
    assert asked(logprobs=None) is None
    assert asked(temperature=0.0) is None


def test_the_options_that_transformers_has_too_get_its_names():
    extra = {"min_tokens": 3, "logit_bias": {"7": -1}, "presence_penalty": 0.5}
    assert transformers_options(extra) == {"min_new_tokens": 3, "sequence_bias": [[[7], -1.0]]}
    assert transformers_options({"min_tokens": 0, "logit_bias": {}}) == {}


@pytest.mark.parametrize(
    ("ids", "reason", "expected"),
    [([7, 2], "stop", Completion([7, 2], True)), ([7, 8, 9, 7], "length", Completion([7, 8, 9, 7], False))],
)
def test_a_completion_ends_with_a_stop_id_or_at_its_longest(ids, reason, expected):
    assert parse_completion(ids, reason, SAMPLING, STOP_IDS, 10) == expected


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([], "stop"), ([7, 8], "stop"), ([7], "length"), ([7, 10], "stop"), ([-1, 2], "stop"), ([7, 2], "abort")],
    ids=["empty", "no stop id", "too short", "unknown token", "negative token", "another reason"],
)
def test_anything_else_is_not_a_completion(ids, reason):
    with pytest.raises(ValueError, match=r"expected (token ids|a completion)"):
        parse_completion(ids, reason, SAMPLING, STOP_IDS, 10)


def test_a_completion_holds_the_log_probs_that_came_with_it():
    def log_probs(values):
        return parse_completion([7, 2], "stop", SAMPLING, STOP_IDS, 10, values).log_probs

    assert log_probs([-0.5, -2.25]) == [-0.5, -2.25]
    first, second = log_probs([-0.5, None])
    assert first == -0.5
    assert math.isnan(second)
    assert log_probs(None) is None


@pytest.mark.parametrize("values", [[], [-0.5], [-0.5, -0.5, -0.5], [-0.5, -math.inf]])
def test_log_probs_that_do_not_fit_the_tokens_make_no_completion(values):
    with pytest.raises(ValueError, match="expected 2 finite log-probs, one per token; got"):
        parse_completion([7, 2], "stop", SAMPLING, STOP_IDS, 10, values)


def test_a_prompt_and_its_completion_have_to_fit_the_engine():
    check_lengths([[1] * 6], SAMPLING, 10)
    check_lengths([], SAMPLING, 4)
    with pytest.raises(GKDConfigError, match="at most 10 tokens, but a prompt of 7 and max_new_tokens=4 make 11"):
        check_lengths([[1], [1] * 7], SAMPLING, 10)

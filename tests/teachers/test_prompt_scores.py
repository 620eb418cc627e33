"""The token sequences that a server must score."""

import numpy as np
import pytest
import torch

from gkd_trainer import GKDDataError
from gkd_trainer.teachers.prompt_scores import (
    NotLogProbsError,
    TopScores,
    check_mass,
    fully_scored,
    parse_scores,
    sequences_of,
)
from gkd_trainer.types import TokenBatch

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[-100, 6, 7, -100]])}


def test_a_sequence_ends_with_the_last_token_that_is_scored():
    [sequence] = sequences_of(TokenBatch.from_inputs(BATCH))
    assert sequence.token_ids == [5, 6, 7]
    assert sequence.targets_P.tolist() == [1, 2]


def test_the_tokens_that_are_scored_are_the_targets_also_where_labels_are_not_shifted():
    batch = TokenBatch.from_inputs(BATCH, label_offset=0)
    [sequence] = sequences_of(batch)
    assert [sequence.token_ids[target] for target in sequence.targets_P] == batch.targets_N.tolist() == [6, 7]


@pytest.mark.parametrize("name", ["pixel_values", "input_features"])
def test_a_batch_with_images_or_sound_is_refused_since_a_server_is_given_tokens_alone(name):
    with pytest.raises(GKDDataError, match=f"this batch also holds {name}"):
        sequences_of(TokenBatch.from_inputs({**BATCH, name: torch.ones(1, 3)}))


def scores_of(log_p):
    return TopScores(np.arange(len(log_p))[None], np.array([log_p]))


@pytest.mark.parametrize("log_p", [[-30.0, -31.0], [-13.5, -13.5]])
def test_top_tokens_with_less_mass_than_of_a_uniform_distribution_are_no_log_probs(log_p):
    with pytest.raises(NotLogProbsError, match=r"the 2 most probable .* with 50257 tokens must have at least 4\.0e-06"):
        check_mass(scores_of(log_p), 50257)


def test_the_top_tokens_of_an_untrained_model_have_mass_enough_even_if_its_head_is_padded():
    check_mass(scores_of([-np.log(60_000)] * 2), 50257)
    check_mass(scores_of([-0.1, -np.inf]), 50257)
    check_mass(scores_of([-np.log(384)]), 259)


@pytest.mark.parametrize(("value", "message"), [(0.5, "a log-prob of 0.5 is above 0"), (-0.1, "mass of 1.81")])
def test_scores_above_those_of_a_distribution_are_no_log_probs(value, message):
    entries = [None, *({"6": {"logprob": value}, "7": {"logprob": value}} for _ in range(2))]
    answer = {"choices": [{"index": 0, "prompt_logprobs": entries}]}
    with pytest.raises(NotLogProbsError, match=message):
        parse_scores(answer, [fully_scored([5, 6, 7])], 2)

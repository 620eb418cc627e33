"""The task: demonstrations are right, other ways are judged by where they lead, and mistakes must be made good."""

import random

import pytest

from experiments.errands import (
    MAX_NEW_TOKENS,
    MOVES,
    STOP,
    VISIT,
    VOCABULARY,
    Errand,
    Walk,
    _noisy_row,
    corrupted,
    effect_of_wrong_step,
    errands,
    model,
    row_of,
)
from gkd_trainer.batch_keys import IGNORE_INDEX

EAST, WEST, NORTH, SOUTH = MOVES


def test_a_wrong_step_leads_away_or_nearer_by_another_way_or_off_the_grid_and_so_nowhere():
    errand = Errand((0, 0), ((2, 2), (0, 0), (0, 0), (0, 0)))
    assert effect_of_wrong_step(errand, [EAST, WEST]) == "away"
    assert effect_of_wrong_step(errand, [NORTH]) == "nearer"
    assert effect_of_wrong_step(errand, [SOUTH]) == "nowhere"


def test_demonstrations_do_their_errands_within_the_vocabulary_and_the_length():
    for errand in errands(500, 0):
        walk = errand.demonstration()
        assert errand.is_done_by(walk)
        assert len(walk) <= MAX_NEW_TOKENS
        assert 0 < max(errand.prompt + walk) < VOCABULARY


def test_errands_depend_only_on_their_seed():
    assert errands(5, 1) == errands(5, 1)
    assert errands(5, 1) != errands(5, 2)


ERRAND = Errand(start=(0, 0), places=((1, 0), (1, 1), (1, 1), (0, 1)))


def test_any_way_that_visits_all_places_in_order_does_the_errand():
    assert ERRAND.demonstration() == [EAST, VISIT, NORTH, VISIT, VISIT, WEST, VISIT, STOP]
    assert ERRAND.is_done_by([NORTH, EAST, SOUTH, VISIT, NORTH, VISIT, VISIT, WEST, VISIT, STOP])


def test_steps_off_the_grid_visits_elsewhere_and_other_tokens_change_nothing():
    assert ERRAND.is_done_by([WEST, SOUTH, VISIT, 9, *ERRAND.demonstration()])


@pytest.mark.parametrize(
    "walk",
    [
        [EAST, VISIT, NORTH, VISIT, VISIT, WEST, VISIT],  # no stop
        [EAST, VISIT, NORTH, VISIT, WEST, VISIT, STOP],  # one visit short
        [EAST, VISIT, NORTH, VISIT, VISIT, NORTH, WEST, VISIT, STOP],  # a step too far
        [EAST, VISIT, NORTH, VISIT, VISIT, WEST, VISIT, STOP, STOP],  # goes on behind the stop
        [],
    ],
)
def test_other_walks_do_not(walk):
    assert not ERRAND.is_done_by(walk)


def test_after_a_corrupted_walk_the_rest_of_the_demonstration_no_longer_does_the_errand():
    numbers = random.Random(0)
    for errand in errands(200, 3):
        demonstration, beginning = errand.demonstration(), corrupted(errand, numbers)
        walk = Walk(errand)
        for token in beginning:
            walk.take(token)
        assert beginning[:-1] == demonstration[: len(beginning) - 1]
        assert beginning[-1] != demonstration[len(beginning) - 1]
        assert not errand.is_done_by(beginning + demonstration[len(beginning) :])
        while not walk.is_over:
            walk.take(walk.best())
        assert errand.is_done_by(walk.tokens)


def test_the_teachers_rows_do_their_errands_and_leave_random_tokens_untrained():
    numbers = random.Random(1)
    for errand in errands(100, 4):
        row = _noisy_row(errand, numbers, noise=0.3)
        walk = row["input_ids"][len(errand.prompt) :]
        labels = row["labels"][len(errand.prompt) :]
        assert errand.is_done_by(walk)
        assert all(label in (token, IGNORE_INDEX) for token, label in zip(walk, labels, strict=True))
        followed = Walk(errand)
        for token, label in zip(walk, labels, strict=True):
            assert label in (followed.best(), IGNORE_INDEX)
            followed.take(token)
    assert IGNORE_INDEX in labels


def test_a_row_trains_on_the_walk_alone():
    row = row_of(ERRAND, ERRAND.demonstration())
    n_prompt = len(ERRAND.prompt)
    assert row["labels"][:n_prompt] == [IGNORE_INDEX] * n_prompt
    assert row["labels"][n_prompt:] == row["input_ids"][n_prompt:]


def test_models_of_one_seed_are_equal():
    first, second, other = (next(model(16, 1, seed).parameters()) for seed in (0, 0, 1))
    assert first.equal(second)
    assert not first.equal(other)

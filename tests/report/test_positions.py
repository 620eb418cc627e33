"""The divergence by position in the completion."""

import itertools
from dataclasses import replace

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.report.positions import FIRST_POSITIONS, PositionSums, positions_in_runs
from gkd_trainer.types import TokenBatch
from tests.teachers.batches import batch_of, batch_of_six, token_rows

CPU = torch.device("cpu")


def test_bins_are_single_positions_and_then_grow():
    assert FIRST_POSITIONS[:17] == tuple(range(17))
    assert all(first < second for first, second in itertools.pairwise(FIRST_POSITIONS))
    assert len(FIRST_POSITIONS) < 60


def test_positions_begin_again_in_each_run_of_trained_tokens():
    batch = batch_of_six()
    # Rows: one run of 7, runs of 3 and 4 with 4 tokens between, four of which two are neighbours, one, and ten.
    expected = [*range(7), *range(3), *range(7, 11), 0, 2, 4, 5, 0, *range(10)]
    assert positions_in_runs(batch.rows_N, batch.columns_N).tolist() == expected
    apart = batch_of(token_rows([30]), [[3, 4, 13, 14, 24, 25]])
    assert positions_in_runs(apart.rows_N, apart.columns_N).tolist() == [0, 1, 10, 11, 0, 1]


@pytest.mark.parametrize("axes", [(), (3,)])
def test_samples_packed_in_a_row_begin_again_however_short_their_prompts(axes):
    # Two samples of a prompt of 4 tokens and a completion of 3, and one whose first token is all its prompt.
    position_ids_BL = torch.tensor([[*range(7), *range(7), *range(3)]])
    labels = [IGNORE_INDEX] * 4 + [5] * 3
    batch = TokenBatch(
        model_inputs={
            "input_ids": torch.full((1, 17), 5),
            "position_ids": position_ids_BL.expand(*axes, *position_ids_BL.shape),
        },
        labels_BL=torch.tensor([labels + labels + [IGNORE_INDEX, 5, 5]]),
        is_on_policy_B=torch.tensor([False]),
    )
    sums = PositionSums()
    sums.add(batch, torch.arange(8.0))
    means = sums.read(CPU, lambda tensor: tensor)["off_policy"]
    assert means.position == (0, 1, 2)
    assert means.tokens == (3, 3, 2)
    assert means.divergence == (3.0, 4.0, 3.5)


def test_means_are_those_of_each_policys_tokens_by_position():
    batch = replace(batch_of_six(), is_on_policy_B=torch.tensor([True, False, False, True, False, True]))
    divergence_N = torch.rand(batch.n_scored, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    divergence_N[3] = torch.nan
    sums = PositionSums()
    sums.add(batch, divergence_N)
    sums.add(batch, 2 * divergence_N)
    means = sums.read(CPU, lambda tensor: tensor)
    found = {}
    positions = positions_in_runs(batch.rows_N, batch.columns_N).tolist()
    for row, position, value in zip(batch.rows_N.tolist(), positions, divergence_N.tolist(), strict=True):
        if value == value:
            found.setdefault(("off_policy", "on_policy")[int(batch.is_on_policy_B[row])], {}).setdefault(
                position, []
            ).extend([value, 2 * value])
    for policy, by_position in found.items():
        assert means[policy].position == tuple(sorted(by_position))
        assert means[policy].tokens == tuple(len(by_position[position]) for position in sorted(by_position))
        expected = [sum(by_position[p]) / len(by_position[p]) for p in sorted(by_position)]
        torch.testing.assert_close(torch.tensor(means[policy].divergence), torch.tensor(expected))
    assert sums.read(CPU, lambda tensor: tensor) == {}


def test_a_long_completion_shares_bins_and_none_is_lost():
    [row] = token_rows([30_000])
    batch = batch_of([row], [range(1, 30_000)])
    sums = PositionSums()
    sums.add(batch, torch.ones(batch.n_scored))
    means = sums.read(CPU, lambda tensor: tensor)["off_policy"]
    assert sum(means.tokens) == 29_999
    assert set(means.divergence) == {1.0}


def test_a_rank_without_tokens_takes_part_in_the_sum():
    reduced = []
    assert PositionSums().read(CPU, lambda tensor: reduced.append(tensor) or tensor) == {}
    assert reduced[0].shape == (2, len(FIRST_POSITIONS), 2)


def test_a_batch_without_trained_tokens_adds_nothing():
    sums = PositionSums()
    batch = batch_of(token_rows([5]), [[]])
    sums.add(batch, torch.zeros(0))
    assert sums.read(CPU, lambda tensor: tensor) == {}

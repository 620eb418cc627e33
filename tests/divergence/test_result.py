"""The fields of a comparison, joined from those of its tiles."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.divergence.result import TokenDivergence, joined, mixed_loss, reordered, weighted_sum


def part(*values, entropy=None):
    values_N = torch.tensor(values, dtype=torch.float64)
    flags_N = torch.ones(len(values), dtype=torch.bool)
    return TokenDivergence(values_N, None, 2 * values_N, 3 * values_N, flags_N, flags_N, flags_N, entropy)


def test_parts_are_joined_in_their_order_and_absent_fields_stay_absent():
    whole = joined([part(1.0, 2.0), part(), part(3.0)])
    assert whole.values_N.tolist() == [1.0, 2.0, 3.0]
    assert whole.teacher_entropy_N.tolist() == [3.0, 6.0, 9.0]
    assert whole.is_finite_N.dtype == torch.bool
    assert whole.cross_entropy_N is None
    assert whole.teacher_mass_N is None


def test_a_part_is_written_where_its_tile_is_and_nowhere_else():
    whole = part(0.0).new_empty(4)
    assert whole.values_N.dtype == torch.float64
    whole.write(slice(0, 4), part(1.0, 2.0, 3.0, 4.0))
    whole.write(slice(1, 3), part(7.0, 8.0))
    assert whole.values_N.tolist() == [1.0, 7.0, 8.0, 4.0]
    assert whole.student_entropy_N.tolist() == [2.0, 14.0, 16.0, 8.0]
    assert whole.cross_entropy_N is None


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 2.0), (1.0, 5.0), (0.25, 2.75)])
def test_the_loss_is_the_weighted_mean_of_value_and_cross_entropy(weight, expected):
    assert mixed_loss(torch.tensor([2.0]), torch.tensor([5.0]), torch.tensor([weight])).item() == expected


def test_a_term_of_weight_zero_may_be_infinite():
    infinite = torch.tensor([torch.inf])
    assert mixed_loss(infinite, torch.tensor([5.0]), torch.ones(1)).item() == 5.0
    assert mixed_loss(torch.tensor([2.0]), infinite, torch.zeros(1)).item() == 2.0


def test_a_field_that_only_some_parts_have_is_nan_in_the_others():
    whole = joined([part(1.0), replace(part(2.0, 3.0), teacher_mass_N=torch.tensor([0.5, 0.25], dtype=torch.float64))])
    assert whole.teacher_mass_N[0].isnan()
    assert whole.teacher_mass_N[1:].tolist() == [0.5, 0.25]


def test_results_return_to_their_positions():
    order_N = torch.tensor([2, 0, 1])
    whole = reordered(part(20.0, 0.0, 10.0), order_N)
    assert whole.values_N.tolist() == [0.0, 10.0, 20.0]
    assert whole.student_entropy_N.tolist() == [0.0, 20.0, 40.0]
    assert whole.cross_entropy_N is None


def test_a_weighted_sum_adds_values_and_averages_statistics():
    first, second = part(1.0, 2.0), replace(part(3.0, 5.0), agrees_N=torch.tensor([False, True]))
    whole = weighted_sum([first, replace(second, is_finite_N=torch.tensor([True, False]))], [1.0, 3.0])
    assert whole.values_N.tolist() == [10.0, 17.0]
    assert whole.student_entropy_N.tolist() == [(2 + 3 * 6) / 4, (4 + 3 * 10) / 4]
    assert whole.agrees_N.tolist() == [0.25, 1.0]
    assert whole.is_finite_N.tolist() == [True, False]
    assert whole.terms_NT.tolist() == [[1.0, 3.0], [2.0, 5.0]]


def test_a_sum_of_one_teacher_is_that_teacher_s_result():
    only = part(1.0, 2.0)
    assert weighted_sum([only], [1.0]) is only

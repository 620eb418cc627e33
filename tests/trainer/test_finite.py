"""The check of finite values: it raises with place and cause, or does nothing."""

import pytest
import torch
from transformers.training_args import OptimizerNames

from gkd_trainer.errors import GKDNumericsError
from gkd_trainer.trainer.finite import FiniteCheck, has_finite_weights, steps_in_backward

FINE = [True, True, True, True]


def add(check, *, rows=(0, 0, 1, 1), batch_size=2, teacher=FINE, value=FINE):
    flags = (torch.tensor(flag, dtype=torch.bool) for flag in (teacher, value))
    check.add(torch.tensor(rows, dtype=torch.long), batch_size, *flags)


def test_finite_values_raise_nothing():
    check = FiniteCheck()
    check.raise_if_not(step=1, rank=0)
    add(check)
    add(check, rows=(), teacher=(), value=())
    check.raise_if_not(step=1, rank=0)


def test_the_error_names_step_rank_micro_batch_and_sample():
    check = FiniteCheck()
    add(check)
    add(check)
    add(check, rows=(0, 2, 2, 3), batch_size=4, value=[True, False, False, True])
    with pytest.raises(GKDNumericsError, match=r"^step 7, rank 3, micro-batch 2, sample 2: .* at 2 of its tokens"):
        check.raise_if_not(step=7, rank=3)


def test_teacher_logits_that_are_not_finite_are_the_cause_named():
    check = FiniteCheck()
    add(check, teacher=[True, True, False, True], value=[True, True, False, False])
    with pytest.raises(GKDNumericsError, match=r"sample 1: the teacher's logits hold NaN or [+]inf at 1 of its tokens"):
        check.raise_if_not(step=1, rank=0)


def test_a_divergence_that_is_not_finite_names_the_student_and_probability_zero():
    check = FiniteCheck()
    add(check, value=[False, True, True, True])
    with pytest.raises(GKDNumericsError) as raised:
        check.raise_if_not(step=1, rank=0)
    message = str(raised.value)
    assert "sample 0: the loss is not finite at 1 of its tokens" in message
    assert "the student's logits hold NaN or +inf" in message
    assert "probability 0" in message
    assert "teacher's logits hold" not in message
    assert "earlier checkpoints are valid" in message
    assert isinstance(raised.value, ArithmeticError)


def test_the_first_bad_sample_is_named_whatever_its_place_in_the_batch():
    check = FiniteCheck()
    add(check, rows=(1, 1, 0, 0), value=[False, True, True, False])
    with pytest.raises(GKDNumericsError, match="sample 0"):
        check.raise_if_not(step=1, rank=0)


def test_a_cleared_window_is_forgotten():
    check = FiniteCheck()
    add(check, value=[False] * 4)
    check.clear()
    check.raise_if_not(step=1, rank=0)
    add(check)
    check.raise_if_not(step=1, rank=0)


def test_every_rank_raises_if_one_must():
    check = FiniteCheck()
    add(check, teacher=[True, True, True, True], value=[True, True, True, True])
    with pytest.raises(GKDNumericsError, match="step 4, rank 1: stopped, since another rank"):
        check.raise_if_not(step=4, rank=1, reduce=lambda flag: flag + 1)


def test_flags_that_are_being_read_are_not_reduced_again():
    reduced = []

    def reduce(flag):
        reduced.append(int(flag))
        return flag

    check = FiniteCheck()
    add(check)
    check.begin_reading(reduce)
    check.raise_if_not(step=1, rank=0, reduce=reduce)
    assert reduced == [0]


def test_flags_added_after_the_reading_began_are_read_too():
    check = FiniteCheck()
    add(check)
    check.begin_reading()
    add(check, value=[True, True, True, False])
    with pytest.raises(GKDNumericsError, match="micro-batch 1, sample 1"):
        check.raise_if_not(step=1, rank=0)


def test_another_rank_s_flag_that_was_being_read_raises_here():
    check = FiniteCheck()
    add(check)
    check.begin_reading(lambda flag: flag + 1)
    with pytest.raises(GKDNumericsError, match="stopped, since another rank"):
        check.raise_if_not(step=4, rank=1)
    check.clear()
    check.raise_if_not(step=5, rank=1)


def test_what_is_beside_is_summed_over_ranks_with_the_flag_and_returned():
    check = FiniteCheck(beside=lambda device: torch.tensor([1.5, 20.0], device=device))
    assert check.raise_if_not(step=1, rank=0) == []
    add(check)
    seen = []

    def reduce(sums):
        seen.append(sums.tolist())
        return 2 * sums

    check.begin_reading(reduce)
    assert check.raise_if_not(step=1, rank=0, reduce=reduce) == [3.0, 40.0]
    assert seen == [[0.0, 1.5, 20.0]]


def test_weights_are_finite_if_all_that_are_trained_are():
    model = torch.nn.Linear(2, 2)
    assert has_finite_weights(model)
    model.bias.data[1] = torch.nan
    assert not has_finite_weights(model)
    model.bias.requires_grad_(False)  # such as a mask kept as a parameter
    assert has_finite_weights(model)


def test_shards_of_weights_are_checked_where_they_are_kept():
    model = torch.nn.Linear(2, 2)
    model.weight.ds_tensor = torch.tensor([0.0, torch.inf])  # as under ZeRO-3
    assert not has_finite_weights(model)


def test_optimizers_that_step_in_the_backward_are_known_by_name():
    names = {name.value for name in OptimizerNames if steps_in_backward(name)}
    assert names >= {"lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"}
    assert all("layerwise" in name or "lomo" in name for name in names)

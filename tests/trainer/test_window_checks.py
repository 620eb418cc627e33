"""What is checked of a window: both checks together, and what is saved when one fails."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gkd_trainer.errors import GKDNumericsError, GKDRolloutError
from gkd_trainer.trainer.recovery import Recovery
from gkd_trainer.trainer.window_checks import WindowChecks
from tests.trainer.test_sampling_check import sums_of

ARGS = SimpleNamespace()
DROPPED = []


@pytest.fixture
def checks(ranks):
    DROPPED.clear()
    return WindowChecks(ranks, Recovery(ranks), lambda: DROPPED.append(True))


def add(checks, *, is_finite=True, is_mixed=True, cross_entropy=0.0, sums=((200, 0.0),)):
    """A micro-batch of one sample of two tokens."""
    rows_N = torch.zeros(2, dtype=torch.long)
    batch = SimpleNamespace(rows_N=rows_N, labels_BL=torch.zeros(1, 3))
    result = SimpleNamespace(
        is_finite_N=torch.tensor([True, is_finite]),
        is_teacher_finite_N=torch.tensor([True, True]),
        loss_N=torch.zeros(2) if is_mixed else None,
        cross_entropy_N=torch.tensor([0.0, cross_entropy]),
    )
    checks.add(batch, result, sums_of(*sums))


def test_a_sound_window_passes_and_is_forgotten(checks):
    for is_finite in (True, False):  # the first window's second micro-batch must not be found in the next
        checks.begin(has_current_rollouts=True)
        add(checks, is_finite=is_finite)
        if is_finite:
            checks.begin_reading()
            checks.require_sound(1, nn.Linear(2, 2), ARGS)
    checks.begin(has_current_rollouts=True)
    add(checks)
    checks.require_sound(2, nn.Linear(2, 2), ARGS)


@pytest.mark.parametrize("is_mixed", [True, False])
def test_a_cross_entropy_counts_only_if_it_is_in_the_loss(checks, is_mixed):
    checks.begin(has_current_rollouts=False)
    add(checks, cross_entropy=torch.inf, is_mixed=is_mixed)
    if is_mixed:
        with pytest.raises(GKDNumericsError, match="step 3, rank 0"):
            checks.require_sound(3, nn.Linear(2, 2), ARGS)
    else:
        checks.require_sound(3, nn.Linear(2, 2), ARGS)


def failing(checks, model, saved):
    """The message of a window with a value that is not finite; what saves a checkpoint says so in `saved`."""
    checks.begin(has_current_rollouts=False)
    add(checks, is_finite=False)
    with (
        pytest.raises(GKDNumericsError, match="step 3, rank 0, micro-batch 0, sample 0") as raised,
        checks._recovery.saving_before_it_fails(2, lambda: saved.append("saved")),
    ):
        checks.require_sound(3, model, ARGS)
    return str(raised.value)


def test_values_that_are_not_finite_are_a_failure_that_all_ranks_save_before(checks):
    checks._recovery.note_random_states()
    saved = []
    assert "not saved" not in failing(checks, nn.Linear(2, 2), saved)
    assert saved == ["saved"]


def test_weights_that_are_not_finite_are_not_saved(checks):
    checks._recovery.note_random_states()
    model, saved = nn.Linear(2, 2), []
    model.weight.data[0, 0] = torch.nan
    assert "so they are not saved" in failing(checks, model, saved)
    assert saved == []


@pytest.mark.parametrize("is_current", [True, False])
def test_only_completions_of_current_weights_are_judged(checks, is_current):
    checks.begin(has_current_rollouts=is_current)
    add(checks, sums=((200, 2.0),))
    if is_current:
        with pytest.raises(GKDRolloutError, match="sampled for step 5"):
            checks.require_sound(5, nn.Linear(2, 2), ARGS)
    else:
        checks.require_sound(5, nn.Linear(2, 2), ARGS)


def test_what_another_model_completed_is_dropped_before_the_last_step_is_saved(checks):
    checks._recovery.note_random_states()
    saved = []
    checks.begin(has_current_rollouts=True)
    add(checks, sums=((200, 2.0),))
    with (
        pytest.raises(GKDRolloutError, match="does not compute the student"),
        checks._recovery.saving_before_it_fails(4, lambda: saved.append(len(DROPPED))),
    ):
        checks.require_sound(5, nn.Linear(2, 2), ARGS)
    assert saved == [1]

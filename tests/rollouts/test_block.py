"""A block: its windows are returned in order, and restored from a checkpoint only if the data is the same."""

import json
import math
from concurrent.futures import Future

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.rollouts import Block, Draw, completed_future, plan_window
from gkd_trainer.types import Completion

X = IGNORE_INDEX
PAD = 0


def micro_batch(first, second):
    """Two samples of three tokens, whose last one is trained on; of the second, padded, only two are real."""
    return {
        "input_ids": torch.tensor([[first, 1, 2], [second, 3, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[X, X, 2], [X, 3, X]]),
    }


def plans_of(*windows, lmbda=0.5, seed=3, first_step=5, teacher_generates=True):
    return [
        plan_window(
            [micro_batch(*pair) for pair in window],
            Draw(lmbda, "sample", seed, first_step + index, rank=0, world_size=1, batch_size=2),
            teacher_generates,
        )
        for index, window in enumerate(windows)
    ]


WINDOWS = [[(10, 11), (20, 21)], [(30, 31), (40, 41)], [(50, 51)]]


def completions_of(plans, mark):
    """For each job a completion that tells whose and which one it is; every other one was cut off."""
    return [
        [Completion([mark, job.prompt[0]], is_finished=job.prompt[0] % 2 == 0) for job in jobs]
        for jobs in ([plan.student_jobs if mark == 77 else plan.teacher_jobs for plan in plans])
    ]


def block_of(plans):
    return Block(list(plans), completed_future(completions_of(plans, 77)), completions_of(plans, 88), weights_step=5)


def rows_of(window):
    return [batch["input_ids"].tolist() for batch in window.batches]


def windows_of(block):
    return [block.window(plan.step, PAD) for plan in block.plans]


def test_each_step_gets_its_window_with_the_completions_of_both_models():
    plans = plans_of(*WINDOWS)
    assert sum(len(plan.student_jobs) for plan in plans) > 2
    assert sum(len(plan.teacher_jobs) for plan in plans) > 2
    block = block_of(plans)
    assert [block.holds(step) for step in range(4, 9)] == [False, True, True, True, False]
    assert block.next_step == 8
    for index, window in enumerate(WINDOWS):
        marks = iter(
            77 if any((job.micro_batch, job.row) == (batch, row) for job in plans[index].student_jobs) else 88
            for batch in range(len(window))
            for row in range(2)
        )
        assert rows_of(block.window(5 + index, PAD)) == [
            [[first, 1, next(marks), first], [second, next(marks), second, PAD]] for first, second in window
        ]


def test_a_block_of_a_checkpoint_is_the_one_that_was_saved():
    saved = block_of(plans_of(*WINDOWS))
    state = json.loads(json.dumps(saved.state(5)))
    restored = Block.restored(state, plans_of(*WINDOWS))
    assert restored.weights_step == 5
    assert restored.state(5) == saved.state(5)
    generated = [window.generated for window in windows_of(saved)]
    assert [window.generated for window in windows_of(restored)] == generated
    assert {item.completion.is_finished for window in generated for item in window} == {True, False}


def test_a_checkpoint_keeps_which_tokens_of_a_completion_are_trained_on():
    plans = plans_of(WINDOWS[0], lmbda=1.0, teacher_generates=False)
    completions = [
        Completion([5, 6, 7], True, is_trained) for is_trained in (None, [True, False, True], [False] * 3, [True] * 3)
    ]
    state = json.loads(json.dumps(Block(plans, completed_future([completions]), [[]], weights_step=5).state(5)))
    assert state["windows"][0]["student"] == [
        [[5, 6, 7], True],
        [[5, 6, 7], True, [True, False, True]],
        [[5, 6, 7], True, [False, False, False]],
        [[5, 6, 7], True, [True, True, True]],
    ]
    [window] = windows_of(Block.restored(state, plans))
    assert [item.completion for item in window.generated] == completions
    assert [batch["labels"].tolist() for batch in window.batches] == [
        [[X, X, 5, 6, 7], [X, 5, X, 7, X]],
        [[X] * 5, [X, 5, 6, 7, X]],
    ]


def test_a_checkpoint_keeps_the_log_probs_of_the_engine():
    plans = plans_of(WINDOWS[0], lmbda=1.0, teacher_generates=False)
    log_probs = [[-0.1, -1.9648051261901855, -3.0], None, [-1.0, math.nan, -2.0], [-0.5] * 3]
    completions = [
        Completion([5, 6, 7], True, is_trained, values)
        for is_trained, values in zip((None, None, [True, False, True], None), log_probs, strict=True)
    ]
    state = json.loads(json.dumps(Block(plans, completed_future([completions]), [[]], weights_step=5).state(5)))
    assert state["windows"][0]["student"][:2] == [[[5, 6, 7], True, None, log_probs[0]], [[5, 6, 7], True]]
    [window] = windows_of(Block.restored(state, plans))
    assert [item.completion for item in window.generated] == completions
    # As texts, in which NaN equals itself.
    assert [repr(item.completion.log_probs) for item in window.generated] == list(map(repr, log_probs))


def test_windows_trained_on_are_not_saved_and_the_others_are():
    block = block_of(plans_of(*WINDOWS))
    state = json.loads(json.dumps(block.state(6)))
    assert [window["step"] for window in state["windows"]] == [6, 7]
    restored = Block.restored(state, plans_of(*WINDOWS)[1:])
    # With other steps' draws these would be other samples: the plans are those of steps 6 and 7.
    assert [rows_of(window) for window in windows_of(restored)] == [rows_of(window) for window in windows_of(block)[1:]]
    assert block.state(8)["windows"] == []


def test_taking_the_state_changes_nothing():
    block, other = block_of(plans_of(*WINDOWS)), block_of(plans_of(*WINDOWS))
    assert block.state(5) == block.state(5)
    assert [rows_of(window) for window in windows_of(block)] == [rows_of(window) for window in windows_of(other)]


OTHERS = {
    "other prompts": plans_of([(10, 11), (20, 22)], *WINDOWS[1:]),
    "another order": plans_of(WINDOWS[1], WINDOWS[0], WINDOWS[2]),
    "another seed": plans_of(*WINDOWS, seed=4),
    "another share": plans_of(*WINDOWS, lmbda=1.0),
    "other steps": plans_of(*WINDOWS, first_step=6),
    "fewer windows": plans_of(*WINDOWS[:2]),
    "more windows": plans_of(*WINDOWS, [(60, 61)]),
    "no samples of the teacher": plans_of(*WINDOWS, teacher_generates=False),
}


@pytest.mark.parametrize("plans", OTHERS.values(), ids=OTHERS.keys())
def test_completions_of_other_prompts_or_steps_are_not_taken(plans):
    state = json.loads(json.dumps(block_of(plans_of(*WINDOWS)).state(5)))
    assert Block.restored(state, plans) is None


def test_a_failure_to_generate_surfaces_when_a_window_is_wanted():
    future = Future()
    future.set_exception(ConnectionError("the server is gone"))
    plans = plans_of(*WINDOWS)
    block = Block(list(plans), future, completions_of(plans, 88), weights_step=5)
    for wanted in (lambda: block.window(5, PAD), lambda: block.state(5)):
        with pytest.raises(ConnectionError, match="the server is gone"):
            wanted()

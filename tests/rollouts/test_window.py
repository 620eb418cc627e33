"""A window's rollouts: one call per engine for all micro-batches, and each completion in its place."""

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY
from gkd_trainer.errors import GKDDataError
from gkd_trainer.rollouts import Draw, RolloutEngine, complete_greedily, generate_jobs, greedy_jobs, plan_window
from gkd_trainer.rollouts.mixing import is_on_policy, sampling_seed
from gkd_trainer.types import Completion, Generated, MediaTokens, Sampling

X = IGNORE_INDEX
PAD = 0
SAMPLING = Sampling(4, temperature=0.9)


class SpyEngine(RolloutEngine):
    """Completes each prompt with its mark and the prompt's first token, and notes every call."""

    def __init__(self, mark):
        self.mark = mark
        self.calls = []

    def generate(self, prompts, sampling, seeds):
        self.calls.append(([list(prompt) for prompt in prompts], sampling, list(seeds)))
        return [Completion([self.mark, prompt[0]], prompt[0] % 2 == 0) for prompt in prompts]

    def sync(self, model):
        pass

    def close(self):
        pass


def draw_of(lmbda, granularity="sample", rank=0, world_size=1, batch_size=2, step=5, seed=42):
    return Draw(lmbda, granularity, seed, step, rank, world_size, batch_size)


def micro_batch(first, second):
    """Two samples of three tokens, whose last one is trained on; of the second, padded, only two are real."""
    return {
        "input_ids": torch.tensor([[first, 1, 2], [second, 3, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[X, X, 2], [X, 3, X]]),
    }


WINDOW = [micro_batch(10, 11), micro_batch(20, 21), micro_batch(30, 31)]
PROMPTS = [[10, 1], [11], [20, 1], [21], [30, 1], [31]]


def roll_out(batches, draw, student=None, teacher=None):
    plan = plan_window(batches, draw, teacher_generates=teacher is not None)
    (student_completions,) = generate_jobs([plan.student_jobs], SAMPLING, student or SpyEngine(77))
    teacher_completions = generate_jobs([plan.teacher_jobs], SAMPLING, teacher)[0] if teacher is not None else []
    return plan.rolled_out(student_completions, teacher_completions, PAD)


def completed_greedily(inputs, engine, *, only_prompts):
    return complete_greedily(inputs, greedy_jobs(inputs, only_prompts), engine, 9, PAD, only_prompts)


def test_the_student_generates_once_per_window():
    student = SpyEngine(77)
    window = roll_out(WINDOW, draw_of(1.0), student)
    assert student.calls == [(PROMPTS, SAMPLING, [sampling_seed(42, 5, position) for position in range(6)])]
    assert [batch["input_ids"].tolist() for batch in window.batches] == [
        [[10, 1, 77, 10], [11, 77, 11, PAD]],
        [[20, 1, 77, 20], [21, 77, 21, PAD]],
        [[30, 1, 77, 30], [31, 77, 31, PAD]],
    ]
    assert all(batch[IS_ON_POLICY].tolist() == [True, True] for batch in window.batches)
    assert (window.samples, window.on_policy_samples, window.without_prompt) == (6, 6, 0)
    assert window.generated[1] == Generated([11], Completion([77, 11], False), True)


def test_nothing_is_generated_at_lambda_0():
    student = SpyEngine(77)
    window = roll_out(WINDOW, draw_of(0.0), student)
    # One call all the same: where weights are sharded, all ranks generate or none.
    assert student.calls == [([], SAMPLING, [])]
    for batch, before in zip(window.batches, WINDOW, strict=True):
        assert torch.equal(batch["input_ids"], before["input_ids"])
        assert torch.equal(batch["labels"], before["labels"])
        assert batch[IS_ON_POLICY].tolist() == [False, False]
    assert (window.samples, window.on_policy_samples, window.generated) == (6, 0, [])


def test_the_samples_drawn_are_the_ones_replaced():
    window = roll_out(WINDOW, draw_of(0.5))
    drawn = [is_on_policy(0.5, "sample", 42, 5, position) for position in range(6)]
    assert set(drawn) == {True, False}
    assert [mark for batch in window.batches for mark in batch[IS_ON_POLICY].tolist()] == drawn
    is_replaced = [77 in row for batch in window.batches for row in batch["labels"].tolist()]
    assert is_replaced == drawn
    assert window.on_policy_samples == sum(drawn)
    assert any(set(batch[IS_ON_POLICY].tolist()) == {True, False} for batch in window.batches)


def test_the_teacher_generates_the_rest_and_its_samples_are_not_on_policy():
    student, teacher = SpyEngine(77), SpyEngine(88)
    window = roll_out(WINDOW, draw_of(0.5), student, teacher)
    drawn = [is_on_policy(0.5, "sample", 42, 5, position) for position in range(6)]
    for engine, chosen in ((student, True), (teacher, False)):
        positions = [position for position in range(6) if drawn[position] is chosen]
        seeds = [sampling_seed(42, 5, position) for position in positions]
        assert engine.calls == [([PROMPTS[position] for position in positions], SAMPLING, seeds)]
    marks = [77 if is_student else 88 for is_student in drawn]
    assert [
        mark in row for row, mark in zip([r for b in window.batches for r in b["labels"].tolist()], marks, strict=True)
    ] == [True] * 6
    assert [mark for batch in window.batches for mark in batch[IS_ON_POLICY].tolist()] == drawn
    assert len(window.generated) == 6
    assert window.on_policy_samples == sum(drawn)
    assert sorted(item.is_on_policy for item in window.generated) == sorted(drawn)


def test_values_that_can_not_be_extended_are_refused_before_any_sample_is_drawn():
    with pytest.raises(GKDDataError, match=r"returned weights \[2, 3\], which may have one value per token"):
        plan_window([{**micro_batch(10, 11), "weights": torch.ones(2, 3)}], draw_of(0.0), teacher_generates=False)


def test_a_sample_without_prompt_stays_as_it_is_and_is_counted():
    text = {
        "input_ids": torch.tensor([[5, 6, 7], [10, 1, 2]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "labels": torch.tensor([[5, 6, 7], [X, X, 2]]),
    }
    window = roll_out([text], draw_of(1.0))
    assert window.without_prompt == 1
    assert window.on_policy_samples == 1
    [batch] = window.batches
    assert batch["input_ids"].tolist() == [[5, 6, 7, PAD], [10, 1, 77, 10]]
    assert batch["labels"].tolist() == [[5, 6, 7, X], [X, X, 77, 10]]
    assert batch[IS_ON_POLICY].tolist() == [False, True]


def test_a_sample_without_prompt_is_not_counted_if_it_need_not_be_generated():
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    assert roll_out([text], draw_of(0.0)).without_prompt == 0
    assert roll_out([text], draw_of(0.0), teacher=SpyEngine(88)).without_prompt == 1


def test_all_of_a_bare_prompt_is_completed():
    prompt = {
        "input_ids": torch.tensor([[PAD, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "labels": torch.full((2, 3), X),
    }
    [batch] = roll_out([prompt], draw_of(1.0)).batches
    assert batch["input_ids"].tolist() == [[5, 6, 77, 5, PAD], [7, 8, 9, 77, 7]]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (1, 4), (2, 4), (4, 2), (2, 2), (8, 1)])
def test_a_position_gets_the_same_draw_and_seed_on_any_layout(world_size, batch_size):
    micro_batches = 16 // (world_size * batch_size)
    seen = {}
    for rank in range(world_size):
        draw = draw_of(0.5, rank=rank, world_size=world_size, batch_size=batch_size)
        for micro in range(micro_batches):
            for row in range(batch_size):
                position = draw.position(micro, row)
                seen[position] = draw.is_on_policy(position), draw.sampling_seed(position)
    assert seen == {
        position: (is_on_policy(0.5, "sample", 42, 5, position), sampling_seed(42, 5, position))
        for position in range(16)
    }


def test_positions_count_rows_then_ranks_then_micro_batches():
    draw = draw_of(0.5, rank=1, world_size=3, batch_size=4)
    assert draw.position(0, 0) == 4
    assert draw.position(0, 3) == 7
    assert draw.position(1, 0) == 16
    assert draw.position(2, 1) == 29


def test_no_two_samples_of_a_step_share_a_position_whatever_their_batches_hold():
    sizes = {0: [4, 9, 1, 5], 1: [12, 2, 4, 4], 2: [1, 1, 30, 4]}  # by rank, where 4 are configured
    positions = [
        draw_of(0.5, rank=rank, world_size=3, batch_size=4).position(micro_batch, row)
        for rank, batches in sizes.items()
        for micro_batch, size in enumerate(batches)
        for row in range(size)
    ]
    assert len(set(positions)) == len(positions) == 77
    assert len({sampling_seed(42, 5, position) for position in positions}) == 77


def test_granularity_batch_takes_all_samples_of_all_ranks_or_none():
    for step in range(10):
        shares = {
            roll_out(WINDOW, draw_of(0.5, "batch", rank=rank, world_size=2, step=step)).on_policy_samples
            for rank in range(2)
        }
        assert shares in ({0}, {6})


def test_evaluation_completes_bare_prompts_greedily_and_keeps_other_rows():
    inputs = {
        "input_ids": torch.tensor([[10, 1, 2], [20, 3, 4]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "labels": torch.tensor([[X, X, X], [X, X, 4]]),
    }
    engine = SpyEngine(77)
    completed = completed_greedily(inputs, engine, only_prompts=True)
    [(prompts, sampling, _)] = engine.calls
    assert prompts == [[10, 1, 2]]
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 9)
    assert completed["input_ids"].tolist() == [[10, 1, 2, 77, 10], [20, 3, 4, PAD, PAD]]
    assert completed["labels"].tolist() == [[X, X, X, 77, 10], [X, X, 4, X, X]]
    assert completed[IS_ON_POLICY].tolist() == [True, False]


def test_evaluation_on_fresh_completions_leaves_rows_without_prompt_unscored():
    inputs = {
        "input_ids": torch.tensor([[10, 1, 2], [20, 3, 4], [5, 6, 7]]),
        "attention_mask": torch.ones(3, 3, dtype=torch.long),
        "labels": torch.tensor([[X, X, X], [X, X, 4], [5, 6, 7]]),
    }
    engine = SpyEngine(77)
    completed = completed_greedily(inputs, engine, only_prompts=False)
    assert engine.calls[0][0] == [[10, 1, 2], [20, 3]]
    assert completed["labels"].tolist() == [[X, X, X, 77, 10], [X, X, 77, 20, X], [X] * 5]


def test_evaluation_without_prompts_still_calls_the_engine_once():
    inputs = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}
    engine = SpyEngine(77)
    completed = completed_greedily(inputs, engine, only_prompts=True)
    assert engine.calls[0][0] == []
    assert completed["labels"].tolist() == [[5, 6]]
    assert completed_greedily(inputs, engine, only_prompts=False)["labels"].tolist() == [[X, X]]
    assert inputs["labels"].tolist() == [[5, 6]]


def test_prompts_with_an_image_are_not_completed_without_it():
    image = 11
    inputs = [micro_batch(10, image)]
    plan_window(inputs, draw_of(0.0), teacher_generates=False, media_tokens=MediaTokens(image))
    with pytest.raises(GKDDataError, match=f"token {image}, which stands for an image"):
        plan_window(inputs, draw_of(1.0), teacher_generates=False, media_tokens=MediaTokens(image))
    plan_window(inputs, draw_of(1.0), teacher_generates=False, media_tokens=MediaTokens(99))

"""The engine completes with the student's current weights, and completions for evaluations are greedy."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gkd_trainer import GKDDataError, GKDRolloutError
from gkd_trainer.report.metrics import Stopwatch
from gkd_trainer.trainer.ranks import Ranks
from gkd_trainer.types import MediaTokens, Sampling
from tests.trainer.queues import PAD, Spy, Student, X, micro_batch, queue_of


@pytest.fixture
def make_queue(ranks):
    return lambda engine=None, queue_ranks=ranks, **options: queue_of(queue_ranks, engine or Spy(), **options)


@pytest.fixture
def engine():
    return Spy()


def test_an_engine_gets_weights_only_if_they_changed(make_queue, engine):
    queue, student, other = make_queue(engine), Student(), Student()
    current = student.at(3)

    def syncs(current):
        before = len(engine.synced)
        with queue.synced(current) as given:
            assert given is engine
        return len(engine.synced) - before

    assert [syncs(current), syncs(current)] == [1, 0]
    assert syncs(replace(current, step=4)) == 1
    with torch.no_grad():
        student.model.weight.add_(1)  # as a checkpoint is loaded between two evaluations
    assert [syncs(replace(current, step=4)) for _ in range(2)] == [1, 0]
    assert engine.synced[-1] == 4
    other.at(3)
    current = other.at(4)
    assert other.model.weight._version == student.model.weight._version
    assert [syncs(current), syncs(current)] == [1, 0]
    queue.drop()
    assert syncs(current) == 1


def test_weights_that_could_not_be_sent_are_sent_again(make_queue, engine):
    queue, student = make_queue(engine), Student().at(3)
    engine.failure = OSError("no space left")
    for _ in range(2):
        with pytest.raises(GKDRolloutError, match=r"sending the student's weights .* failed with OSError"):
            queue.synced(student).__enter__()
    engine.failure = None
    with queue.synced(student):
        assert engine.synced == [3]


def test_a_failure_while_the_engine_is_synced_is_a_failure_to_generate(make_queue):
    with (
        pytest.raises(GKDRolloutError, match="generating completions failed with LookupError"),
        make_queue().synced(Student().at(0)),
    ):
        raise LookupError


def test_the_time_of_a_sync_is_measured_on_request(make_queue):
    queue, timer = make_queue(), Stopwatch(torch.device("cpu"))
    with queue.synced(Student().at(0)):
        assert timer.read() == {}
    with queue.synced(Student().at(1), timer):
        assert timer.read().keys() == {"sync"}


def test_completions_are_generated_in_the_precision_that_the_loss_sees(make_queue):
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = make_queue(queue_ranks=Ranks(Accelerator(cpu=True, mixed_precision="bf16")))
    for queue, is_mixed in ((make_queue(), False), (mixed, True)):
        with queue.synced(Student().at(0)):
            assert torch.is_autocast_enabled("cpu") is is_mixed
    assert not torch.is_autocast_enabled("cpu")


def test_a_batch_is_completed_greedily_and_scored_on_nothing_else(make_queue, engine):
    queue = make_queue(engine)
    inputs = micro_batch(10)
    inputs["labels"][0] = torch.tensor([10, 1, 2])  # no prompt
    completed = queue.completed(inputs, Student().at(3))
    assert completed["input_ids"].tolist() == [[10, 1, 2, PAD], [11, 3, 103, 11]]
    assert completed["labels"].tolist() == [[X] * 4, [X, X, 103, 11]]
    assert [call[1] for call in engine.calls] == [Sampling(4, temperature=0.0)]


def test_a_prompt_with_an_image_is_not_completed(make_queue):
    queue = make_queue(media_tokens=MediaTokens(image=3))
    for complete in (queue.completed, queue.completed_prompts):
        with pytest.raises(GKDDataError, match="a prompt to be completed holds token 3"):
            complete(micro_batch(10), Student().at(3))


def test_bare_prompts_are_completed_and_other_rows_stay(make_queue, engine):
    completed = make_queue(engine).completed_prompts(micro_batch(10), Student().at(3))
    assert completed["labels"].tolist() == [[X, X, 2, X], [X, X, 103, 11]]
    assert [call[0] for call in engine.calls] == [[[11, 3]]]


@pytest.mark.parametrize("other_has_prompts", [False, True])
def test_without_bare_prompts_the_engine_is_called_only_if_another_rank_has_some(
    make_queue, engine, two_ranks, other_has_prompts
):
    ranks = two_ranks(other_has_prompts, *[0] * 5)
    inputs = {name: values[:1] for name, values in micro_batch(10).items()}
    completed = make_queue(engine, queue_ranks=ranks).completed_prompts(inputs, Student().at(3))
    assert (completed is inputs) is not other_has_prompts
    assert completed["labels"].tolist() == [[X, X, 2]]
    assert [call[0] for call in engine.calls] == ([[]] if other_has_prompts else [])

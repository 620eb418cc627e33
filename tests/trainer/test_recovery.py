"""A failure becomes one typed error on every rank, after a checkpoint of the last complete step."""

import random

import numpy as np
import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from gkd_trainer import (
    GKDArguments,
    GKDDataError,
    GKDError,
    GKDNumericsError,
    GKDRolloutError,
    GKDServerError,
    GKDTeacherError,
)
from gkd_trainer.trainer import trainer as trainer_module
from gkd_trainer.trainer.recovery import Recovery, warn_of_short_exchanges


def test_the_part_and_the_cause_of_a_failure_are_named(ranks):
    cause = LookupError("nothing there")
    with pytest.raises(GKDTeacherError) as raised, Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise cause
    assert str(raised.value) == "scoring failed with LookupError: nothing there"
    assert raised.value.__cause__ is cause


def test_our_own_errors_pass_unchanged_and_so_does_no_failure(ranks):
    error = GKDServerError("gone")
    with pytest.raises(GKDServerError) as raised, Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise error
    assert raised.value is error
    with pytest.raises(KeyboardInterrupt), Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise KeyboardInterrupt


def test_an_iterator_that_ends_too_early_is_a_failure_too(ranks):
    recovery = Recovery(ranks)
    with (
        pytest.raises(GKDRolloutError, match="failed with StopIteration") as raised,
        recovery.failing_together(GKDRolloutError, "generating"),
    ):
        raise StopIteration
    assert raised.value.__cause__ is None


KINDS = [GKDError, *GKDError.__subclasses__()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_others_raise_the_kind_of_error_that_one_rank_raised(two_ranks, kind, caplog):
    failing = two_ranks(0)
    with pytest.raises(kind, match="on this rank"):
        Recovery(failing).raise_together(kind("on this rank"), GKDRolloutError, "generating")
    assert "Rank 0: on this rank" in caplog.text  # before the exchange, which may never end
    hearing = two_ranks(*failing.said[0])
    with pytest.raises(GKDError, match="stopped, since another rank failed") as raised:
        Recovery(hearing).raise_together(None, GKDRolloutError, "generating")
    assert type(raised.value) is kind
    assert hearing.said == [[0]]


def test_if_two_ranks_fail_each_raises_its_own_error(two_ranks):
    failing = two_ranks(0)
    with pytest.raises(GKDServerError):
        Recovery(failing).raise_together(GKDServerError("gone"), GKDRolloutError, "generating")
    with pytest.raises(GKDDataError, match="a row"):
        Recovery(two_ranks(*failing.said[0])).raise_together(GKDDataError("a row"), GKDRolloutError, "generating")


def test_ranks_exchange_failures_only_if_all_enter_the_block(two_ranks):
    together, alone = two_ranks(0), two_ranks()
    with Recovery(together).failing_together(GKDRolloutError, "generating"):
        pass
    assert together.said == [[0]]
    with Recovery(alone).failing_together(GKDTeacherError, "scoring", exchanges=False):
        pass
    with pytest.raises(GKDTeacherError), Recovery(alone).failing_together(GKDTeacherError, "scoring", exchanges=False):
        raise ValueError
    assert alone.said == []


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_out_of_memory_passes_unchanged_if_trainer_restarts_and_is_typed_otherwise(ranks):
    with pytest.raises(torch.OutOfMemoryError) as raised:
        Recovery(ranks, restarts_without_memory=True).raise_together(OUT_OF_MEMORY, GKDRolloutError, "generating")
    assert raised.value is OUT_OF_MEMORY
    with pytest.raises(GKDRolloutError, match="generating failed with OutOfMemoryError"):
        Recovery(ranks).raise_together(OUT_OF_MEMORY, GKDRolloutError, "generating")
    with pytest.raises(GKDRolloutError, match="ValueError"):
        Recovery(ranks, restarts_without_memory=True).raise_together(ValueError(), GKDRolloutError, "generating")


@pytest.mark.parametrize("own", [None, ValueError("another failure")])
def test_trainer_restarts_on_all_ranks_if_one_runs_out_of_memory(two_ranks, own):
    recovery = Recovery(two_ranks(1), restarts_without_memory=True)
    with pytest.raises(RuntimeError) as raised:
        recovery.raise_together(own, GKDRolloutError, "generating")
    assert should_reduce_batch_size(raised.value)


@pytest.fixture
def fail_at(tmp_path):
    """Let a failure end a step; return what was raised, and the step of each checkpoint that was saved."""

    def fail_at(recovery, step, error=None, kind=GKDRolloutError, exchanges=True):
        saved = []

        def save():
            saved.append(step)
            recovery.last_checkpoint = tmp_path / f"checkpoint-{step}"

        with pytest.raises(GKDError) as raised, recovery.saving_before_it_fails(step, save):
            recovery.raise_together(error or ValueError("no"), kind, "generating", exchanges=exchanges)
        return raised.value, saved

    return fail_at


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_names_the_checkpoint_of_the_last_step_and_keeps_its_kind(ranks, fail_at, tmp_path, kind):
    original = kind("gone")
    error, saved = fail_at(Recovery(ranks), 3, original)
    assert saved == [3]
    assert type(error) is kind
    assert error.__cause__ is original
    when = "once the server is back" if kind is GKDServerError else "once it is fixed"
    assert str(error) == (
        f"gone. The run up to step 3 is saved in {tmp_path / 'checkpoint-3'}: {when}, resume with "
        "train(resume_from_checkpoint=True)"
    )


def test_a_checkpoint_of_only_weights_is_not_called_the_run(ranks, fail_at):
    error, _ = fail_at(Recovery(ranks, saves_only_model=True), 3)
    assert "The weights, without what save_only_model leaves out, up to step 3 is saved in" in str(error)


def test_a_step_that_has_its_checkpoint_is_not_saved_again(ranks, fail_at, tmp_path):
    recovery = Recovery(ranks)
    recovery.last_checkpoint = tmp_path / "checkpoint-3"
    error, saved = fail_at(recovery, 3)
    assert saved == []
    assert str(recovery.last_checkpoint) in str(error)
    assert fail_at(recovery, 4)[1] == [4]


def test_blocks_in_one_another_save_once(ranks, tmp_path):
    recovery, saved = Recovery(ranks), []
    with (
        pytest.raises(GKDRolloutError) as raised,
        recovery.saving_before_it_fails(3, lambda: saved.append("outer")),
        recovery.saving_before_it_fails(3, lambda: saved.append("inner")),
    ):
        recovery.raise_together(ValueError(), GKDRolloutError, "generating")
    assert saved == ["inner"]
    assert str(raised.value).count("up to step 3") == 1


@pytest.mark.parametrize("step", [None, 0])
def test_before_the_first_step_there_is_nothing_to_save(ranks, fail_at, step):
    original = GKDRolloutError("gone")
    error, saved = fail_at(Recovery(ranks), step, original)
    assert error is original
    assert saved == []


def test_an_error_on_one_rank_saves_nothing_since_saving_takes_all(two_ranks, ranks, fail_at):
    original = GKDTeacherError("gone")
    error, saved = fail_at(Recovery(two_ranks()), 3, original, exchanges=False)
    assert error is original
    assert saved == []
    assert fail_at(Recovery(two_ranks(0)), 3)[1] == [3]
    assert fail_at(Recovery(ranks), 3, exchanges=False)[1] == [3]  # one rank is all of them
    with pytest.raises(GKDDataError, match=r"^a row$"), Recovery(ranks).saving_before_it_fails(3, pytest.fail):
        raise GKDDataError("a row")  # of which the others know nothing


def test_a_checkpoint_holds_the_random_states_of_the_steps_end(ranks):
    recovery, saved = Recovery(ranks), []

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    recovery.note_random_states()
    at_the_end = draw()
    with pytest.raises(GKDError), recovery.saving_before_it_fails(3, lambda: saved.append(draw())):
        recovery.raise_together(ValueError(), GKDRolloutError, "generating")
    assert saved == [at_the_end]


@pytest.mark.parametrize("before", [None, "checkpoint-2"])
def test_a_save_that_fails_is_named_beside_what_ended_the_run(ranks, tmp_path, before):
    recovery = Recovery(ranks)
    recovery.last_checkpoint = before and tmp_path / before

    def save():
        recovery.last_checkpoint = tmp_path / "checkpoint-3"
        raise OSError("No space left on device")

    with pytest.raises(GKDRolloutError) as raised, recovery.saving_before_it_fails(3, save):
        recovery.raise_together(ValueError("first"), GKDRolloutError, "generating")
    assert str(raised.value) == (
        "generating failed with ValueError: first. The run up to step 3 could not be saved (OSError: No space left on "
        f"device); the last checkpoint is {recovery.last_checkpoint.with_name(before) if before else 'none'}"
    )


def test_a_failure_that_all_ranks_know_of_is_saved_without_another_exchange(two_ranks, tmp_path):
    recovery, error = Recovery(two_ranks()), GKDNumericsError("not finite")

    def save():
        recovery.last_checkpoint = tmp_path / "checkpoint-3"

    message = r"^not finite\. The run up to step 3 is saved in .*checkpoint-3"
    with pytest.raises(GKDNumericsError, match=message), recovery.saving_before_it_fails(3, save):
        recovery.raise_known(error)


SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:1"}
TEACHER = {"teacher_server_base_url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("options", "world_size", "warns"),
    [
        ({**SERVER, "vllm_server_timeout": 1500.0}, 2, True),
        ({**TEACHER, "vllm_request_timeout": 1560.0}, 2, True),
        ({**SERVER, "vllm_server_timeout": 1499.0}, 2, False),
        ({**SERVER, "vllm_server_timeout": 1500.0}, 1, False),
        ({"vllm_server_timeout": 1500.0}, 2, False),
        (SERVER, 2, False),
    ],
)
def test_ranks_that_would_not_wait_for_a_call_to_fail_are_warned_of(caplog, options, world_size, warns):
    args = GKDArguments(**options)
    args.world_size, args.ddp_timeout = world_size, 1800  # of TrainingArguments
    warn_of_short_exchanges(args)
    assert caplog.messages == (
        [
            "A call to a server may take vllm_server_timeout + vllm_request_timeout = 1800 s before it fails, but the "
            "other ranks wait for this one only for ddp_timeout=1800 s: the run would then end without a checkpoint. "
            "Raise ddp_timeout."
        ]
        if warns
        else []
    )


def test_a_trainer_compares_the_time_outs_of_its_options(make_trainer, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer_module, "warn_of_short_exchanges", asked.append)
    trainer = make_trainer()
    assert asked == [trainer.args]

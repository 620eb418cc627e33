"""Whatever fails in rollouts, a sync or a teacher ends in one typed error, after a checkpoint that resumes."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from gkd_trainer import (
    FrozenTeacher,
    GKDConfigError,
    GKDDataError,
    GKDError,
    GKDRolloutError,
    GKDServerError,
    GKDTeacherError,
    HFRollouts,
)
from gkd_trainer.errors import GKDNumericsError
from gkd_trainer.trainer.checkpoints import damage
from gkd_trainer.trainer.recovery import Recovery
from tests.versions import IN_ORDER

ERRORS = [
    AttributeError("'list' object has no attribute 'get'"),
    OverflowError("int too large to convert to float"),
    RecursionError("maximum recursion depth exceeded"),
    StopIteration(),
    SafetensorError("No space left on device"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
]


class Fault(TrainerCallback):
    """Makes a method fail from a step's end on, until it is healed."""

    def __init__(self, owner, name, step, error):
        self.owner, self.name, self.step, self.error = owner, name, step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:

            def fail(*args, **kwargs):
                raise self.error

            setattr(self.owner, self.name, fail)


OPTIONS = {"max_steps": 4, "lmbda": 0.5, "seed": 3}


@pytest.fixture
def run(make_trainer, tiny_model, tmp_path):
    """Train with a fault in a part of the trainer; return the trainer."""

    def run(part=None, name=None, error=None, folder="run", resume=None, **options):
        teacher = FrozenTeacher(tiny_model(hidden=48, seed=1))
        trainer = make_trainer(
            trainer_args={"teacher_model": None, "teacher": teacher},
            output_dir=str(tmp_path / folder),
            **{**OPTIONS, **options},
        )
        if part is not None:
            trainer.add_callback(Fault(getattr(trainer, part), name, 2, error))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [
        ("rollouts", "generate", GKDRolloutError),
        ("rollouts", "sync", GKDRolloutError),
        ("teacher", "score", GKDTeacherError),
    ],
)
def test_any_exception_becomes_a_typed_error_that_names_its_checkpoint(run, tmp_path, part, name, kind, error):
    with pytest.raises(kind, match="checkpoint-2") as raised:
        run(part, name, error)
    assert type(error).__name__ in str(raised.value)
    assert raised.value.__cause__.__cause__ is (None if isinstance(error, StopIteration) else error)
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("error", [GKDServerError("gone"), GKDTeacherError("gone"), GKDConfigError("too long")])
def test_our_own_errors_keep_their_type(run, tmp_path, error):
    with pytest.raises(type(error), match=r"gone|too long") as raised:
        run("rollouts", "generate", error)
    assert "checkpoint-2" in str(raised.value)
    assert "once the server is back" in str(raised.value) or not isinstance(error, GKDServerError)


@pytest.mark.parametrize(
    ("part", "name"), [("rollouts", "generate"), ("rollouts", "sync"), ("teacher", "score")], ids=lambda part: part
)
def test_the_checkpoint_resumes_to_what_the_unbroken_run_gives(run, tmp_path, part, name):
    expected = run(folder="expected")
    with pytest.raises(GKDError):
        run(part, name, ValueError("once"))
    resumed = run(resume=True)
    assert losses(resumed) == losses(expected)
    for key, tensor in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


def test_an_error_in_the_first_step_leaves_no_checkpoint(make_trainer, tmp_path):
    class Broken(HFRollouts):
        def generate(self, prompts, sampling, seeds):
            raise LookupError("nothing")

    trainer = make_trainer(trainer_args={"rollouts": Broken([2])}, lmbda=1.0, output_dir=str(tmp_path / "run"))
    with pytest.raises(GKDRolloutError, match="generating completions failed with LookupError: nothing") as raised:
        trainer.train()
    assert "checkpoint" not in str(raised.value)
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_checkpoint_that_can_not_be_written_does_not_hide_what_failed(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(GKDRolloutError, match=r"first cause.*could not be saved .*No space left.* none"):
        run("rollouts", "generate", ValueError("first cause"))


def test_a_model_that_runs_out_of_memory_still_gets_smaller_batches(make_trainer):
    class Hungry(HFRollouts):
        sizes = ()

        def generate(self, prompts, sampling, seeds):
            self.sizes += (len(prompts),)
            if len(prompts) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().generate(prompts, sampling, seeds)

    engine = Hungry([2])
    trainer = make_trainer(
        trainer_args={"rollouts": engine}, lmbda=1.0, auto_find_batch_size=True, per_device_train_batch_size=4
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert max(engine.sizes) == 4
    assert engine.sizes[-1] <= 2


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt"])
def test_resuming_takes_the_last_whole_checkpoint(run, tmp_path, missing, caplog):
    expected = run(folder="expected", save_strategy="steps", save_steps=1)
    run(save_strategy="steps", save_steps=1)
    for checkpoint, name in (("checkpoint-4", "trainer_state.json"), ("checkpoint-3", missing)):
        file = tmp_path / "run" / checkpoint / name
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(GKDConfigError, match=r"checkpoint-3.*resume from .*checkpoint-2"):
        run(resume=str(tmp_path / "run" / "checkpoint-3"))
    resumed = run(resume=True)
    assert "Resuming from" in caplog.text
    assert "checkpoint-2, the last whole checkpoint" in caplog.text
    assert losses(resumed) == losses(expected)
    weights = load_file(tmp_path / "expected" / "checkpoint-4" / "model.safetensors")
    for key, tensor in weights.items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


def test_a_save_that_is_broken_off_in_an_older_checkpoint_does_not_leave_a_whole_one(run, tmp_path, monkeypatch):
    run(save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert damage(checkpoint) is None

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        run(save_strategy="steps", save_steps=4, learning_rate=0.5)
    assert "it has no trainer_state.json" in damage(checkpoint)


def test_completions_that_are_missing_in_a_checkpoint_are_generated_again(run, tmp_path, caplog):
    options = {"rollout_steps": 2, "save_strategy": "steps", "save_steps": 1, "lmbda": 1.0}
    expected = run(folder="expected", **options)
    run(**options)
    file = tmp_path / "run" / "checkpoint-3" / "rollouts-rank0.json"
    states = json.loads(file.read_text())
    states[0]["windows"][0]["student"].pop()
    file.write_text(json.dumps(states))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = run(resume=True, **options)
    assert "completions of other prompts or steps" in caplog.text
    assert resumed.state.global_step == expected.state.global_step


def test_a_sample_that_can_not_be_completed_ends_the_run_after_a_checkpoint(make_trainer, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "position_ids": [0, 1, 2, 3]} for _ in range(16)]
    rows[13]["position_ids"] = [3, 2, 1, 0]

    def collator(batch):
        return {name: torch.tensor([row[name] for row in batch]) for name in rows[0]}

    trainer = make_trainer(
        trainer_args={"train_dataset": Dataset.from_list(rows), "data_collator": collator},
        lmbda=1.0,
        max_steps=4,
        output_dir=str(tmp_path / "run"),
        **IN_ORDER,
    )
    with pytest.raises(GKDDataError, match=r"position_ids.*count up by one.*checkpoint-3"):
        trainer.train()
    assert damage(tmp_path / "run" / "checkpoint-3") is None


def test_the_part_and_the_cause_of_a_failure_are_named(ranks):
    cause = LookupError("nothing there")
    with pytest.raises(GKDTeacherError) as raised, Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise cause
    assert str(raised.value) == "scoring failed with LookupError: nothing there"
    assert raised.value.__cause__ is cause


def test_our_own_errors_pass_as_they_are_and_so_does_what_is_no_failure(ranks):
    error = GKDServerError("gone")
    with pytest.raises(GKDServerError) as raised, Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise error
    assert raised.value is error
    with pytest.raises(KeyboardInterrupt), Recovery(ranks).failing_together(GKDTeacherError, "scoring"):
        raise KeyboardInterrupt


def test_an_iterator_that_ends_where_it_must_not_is_a_failure_too(ranks):
    recovery = Recovery(ranks)
    with (
        pytest.raises(GKDRolloutError, match="failed with StopIteration") as raised,
        recovery.failing_together(GKDRolloutError, "generating"),
    ):
        raise StopIteration
    assert raised.value.__cause__ is None


KINDS = [GKDError, GKDDataError, GKDConfigError, GKDRolloutError, GKDTeacherError, GKDServerError]


@pytest.mark.parametrize("kind", [*KINDS, GKDNumericsError])
def test_what_one_rank_raises_the_others_raise_in_its_kind(two_ranks, kind):
    failing = two_ranks(0)
    with pytest.raises(kind, match="on this rank"):
        Recovery(failing).raise_together(kind("on this rank"), GKDRolloutError, "generating")
    hearing = two_ranks(*failing.said[0])
    with pytest.raises(GKDError, match="stopped, since another rank failed") as raised:
        Recovery(hearing).raise_together(None, GKDRolloutError, "generating")
    assert type(raised.value) is (kind if kind in KINDS else GKDError)
    assert hearing.said == [[0]]


def test_of_two_ranks_that_fail_each_raises_its_own(two_ranks):
    failing = two_ranks(0)
    with pytest.raises(GKDServerError):
        Recovery(failing).raise_together(GKDServerError("gone"), GKDRolloutError, "generating")
    with pytest.raises(GKDDataError, match="a row"):
        Recovery(two_ranks(*failing.said[0])).raise_together(GKDDataError("a row"), GKDRolloutError, "generating")


def test_ranks_exchange_failures_only_where_all_of_them_enter_the_block(two_ranks):
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


def test_out_of_memory_passes_as_it_is_where_trainer_restarts_and_is_typed_elsewhere(ranks):
    with pytest.raises(torch.OutOfMemoryError) as raised:
        Recovery(ranks, restarts_without_memory=True).raise_together(OUT_OF_MEMORY, GKDRolloutError, "generating")
    assert raised.value is OUT_OF_MEMORY
    with pytest.raises(GKDRolloutError, match="generating failed with OutOfMemoryError"):
        Recovery(ranks).raise_together(OUT_OF_MEMORY, GKDRolloutError, "generating")
    with pytest.raises(GKDRolloutError, match="ValueError"):
        Recovery(ranks, restarts_without_memory=True).raise_together(ValueError(), GKDRolloutError, "generating")


@pytest.mark.parametrize("own", [None, ValueError("another failure")])
def test_trainer_restarts_on_all_ranks_where_one_ran_out_of_memory(two_ranks, own):
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
        f"gone. The run up to step 3 is saved in {tmp_path / 'checkpoint-3'}: {when}, go on with "
        "train(resume_from_checkpoint=True)"
    )


def test_weights_that_are_saved_alone_are_not_called_the_run(ranks, fail_at):
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


def test_what_one_rank_raises_alone_saves_nothing_since_saving_takes_all(two_ranks, ranks, fail_at):
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

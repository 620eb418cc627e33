"""A failure in rollouts, a sync or a teacher ends in one typed error, after a checkpoint that resumes."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from gkd_trainer import (
    FrozenTeacher,
    GKDConfigError,
    GKDDataError,
    GKDError,
    GKDNumericsError,
    GKDRolloutError,
    GKDServerError,
    GKDTeacherError,
    HFRollouts,
)
from gkd_trainer.trainer.checkpoints import damage
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
def test_the_checkpoint_resumes_to_the_result_of_an_uninterrupted_run(run, tmp_path, part, name):
    expected = run(folder="expected")
    with pytest.raises(GKDError):
        run(part, name, ValueError("once"))
    resumed = run(resume=True)
    assert losses(resumed) == losses(expected)
    for key, tensor in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


class NotFinite(TrainerCallback):
    """Flags all values after a step as not finite, and breaks the weights at that step if asked."""

    def __init__(self, trainer, step, breaks_weights):
        self.trainer, self.step, self.breaks_weights = trainer, step, breaks_weights

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        check = self.trainer._checks.finite
        add = check.add
        check.add = lambda rows_N, size, *flags: add(rows_N, size, *(flag_N & False for flag_N in flags))
        if self.breaks_weights:
            next(self.trainer.model.parameters()).data[0, 0] = torch.inf


@pytest.fixture
def run_until_not_finite(make_trainer, tmp_path):
    """Train until values are not finite in the third step; return the error."""

    def run(breaks_weights):
        trainer = make_trainer(output_dir=str(tmp_path / "run"), gradient_accumulation_steps=2, **OPTIONS)
        trainer.add_callback(NotFinite(trainer, 2, breaks_weights))
        with pytest.raises(GKDNumericsError, match="step 3, rank 0, micro-batch 0, sample 0") as raised:
            trainer.train()
        return str(raised.value)

    return run


def test_values_that_are_not_finite_leave_a_checkpoint_that_resumes(run, run_until_not_finite):
    options = {"gradient_accumulation_steps": 2}
    expected = run(folder="expected", **options)
    error = run_until_not_finite(breaks_weights=False)
    assert "The run up to step 2 is saved in" in error
    resumed = run(resume=True, **options)
    assert losses(resumed) == losses(expected)
    for key, tensor in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


def test_an_optimizer_that_steps_in_the_backward_does_not_take_the_step_either(make_trainer, tiny_model, tmp_path):
    def step(weight):
        weight.data -= weight.grad

    model = tiny_model()
    for weight in model.parameters():  # as Trainer's layerwise optimizers do
        weight.register_post_accumulate_grad_hook(step)
    trainer = make_trainer(
        trainer_args={"model": model, "optimizers": (torch.optim.SGD(model.parameters(), lr=0.0), None)},
        output_dir=str(tmp_path / "run"),
        optim="galore_adamw_layerwise",
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.add_callback(NotFinite(trainer, 2, breaks_weights=False))
    with pytest.raises(GKDNumericsError, match="step 3"):
        trainer.train()
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    assert any(not torch.equal(second[name], first[name]) for name in first)
    for name, weight in model.state_dict().items():
        assert name not in second or torch.equal(weight, second[name]), name


def test_weights_that_are_not_finite_are_not_saved(run_until_not_finite, tmp_path):
    assert "weights are not finite since an earlier step" in run_until_not_finite(breaks_weights=True)
    assert not list(tmp_path.glob("run/checkpoint-*"))


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
def test_resuming_takes_the_last_complete_checkpoint(run, tmp_path, missing, caplog):
    expected = run(folder="expected", save_strategy="steps", save_steps=1)
    run(save_strategy="steps", save_steps=1)
    for checkpoint, name in (("checkpoint-4", "trainer_state.json"), ("checkpoint-3", missing)):
        file = tmp_path / "run" / checkpoint / name
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(GKDConfigError, match=r"checkpoint-3.*resume from .*checkpoint-2"):
        run(resume=str(tmp_path / "run" / "checkpoint-3"))
    resumed = run(resume=True)
    assert "Resuming from" in caplog.text
    assert "checkpoint-2, the last complete checkpoint" in caplog.text
    assert losses(resumed) == losses(expected)
    weights = load_file(tmp_path / "expected" / "checkpoint-4" / "model.safetensors")
    for key, tensor in weights.items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


def test_a_save_interrupted_in_an_older_checkpoint_leaves_it_incomplete(run, tmp_path, monkeypatch):
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
    assert "completions belong to other prompts or steps" in caplog.text
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

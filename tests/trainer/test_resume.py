"""A killed run resumes as if it had not been interrupted."""

import signal

import pytest
import torch

from tests.versions import HAS_SAMPLING_STRATEGY, IN_ORDER, RESTORES_RANDOM_STATES_WITHOUT_A_BATCH

needs_sampling_strategy = pytest.mark.skipif(
    not HAS_SAMPLING_STRATEGY, reason="transformers before 5.2 has no train_sampling_strategy"
)

OPTIONS = {
    "lmbda": 0.5,
    "disable_dropout": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def unbroken(full_run, tiny_model, tmp_path_factory):
    """The result and the weights of a run with dropout that nobody kills."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    return full_run(folder, student=tiny_model(attention_dropout=0.2), **OPTIONS)[:2]


# 20 rows in windows of 4 make 5 steps an epoch: in the middle of the first, at its end, in the middle of the second.
@pytest.mark.parametrize("die_at", [2, 5, 7])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(unbroken, full_run, tiny_model, tmp_path, die_at):
    expected_result, expected = unbroken
    shares = {entry["on_policy_share"] for entry in expected_result["log"] if "on_policy_share" in entry}
    assert len(shares) > 1  # on- and off-policy samples are mixed

    student = tiny_model(attention_dropout=0.2)
    result, _, process = full_run(tmp_path / "killed", student=student, die_at=die_at, **OPTIONS)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert result is None
    result, weights, _ = full_run(tmp_path / "killed", resume=True, **OPTIONS)

    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert result["evaluation"]["eval_loss"] == expected_result["evaluation"]["eval_loss"]


def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(
    unbroken, full_run, tiny_model, tmp_path, caplog
):
    student = tiny_model(attention_dropout=0.2)
    result, _, process = full_run(tmp_path / "killed", student=student, die_in_save=7, **OPTIONS)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert result is None
    assert (tmp_path / "killed" / "run" / "checkpoint-7").is_dir()
    _, weights, _ = full_run(tmp_path / "killed", resume=True, **OPTIONS)
    assert "checkpoint-6, the last complete checkpoint" in caplog.text
    for name, tensor in unbroken[1].items():
        assert torch.equal(weights[name], tensor), name


def test_dropout_changes_the_run_above(unbroken, full_run, tiny_model, tmp_path):
    student = tiny_model(attention_dropout=0.2)
    _, weights, _ = full_run(tmp_path / "without", student=student, **{**OPTIONS, "disable_dropout": True})
    assert any(not torch.equal(weights[name], tensor) for name, tensor in unbroken[1].items())


def weights_of(make_trainer, tiny_model, rows, *, resume=None, **options):
    trainer = make_trainer(
        trainer_args={"train_dataset": rows, "model": tiny_model(attention_dropout=0.2)},
        **{**OPTIONS, "save_total_limit": None, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# As docs/migrating.md has it. The steps: in the middle of the first epoch, at its end, in the middle of the second.
@pytest.mark.parametrize(
    ("options", "is_streamed", "exact_at"),
    [
        (IN_ORDER, False, {2, 5, 7}),
        pytest.param({"train_sampling_strategy": "group_by_length"}, False, {2, 5}, marks=needs_sampling_strategy),
        ({"accelerator_config": {"use_seedable_sampler": False}}, False, {2, 5}),
        ({"ignore_data_skip": True}, False, {5}),
        ({}, True, {2, 5} if RESTORES_RANDOM_STATES_WITHOUT_A_BATCH else {2}),
    ],
)
def test_resume_is_exact_except_where_trainer_loses_its_place_in_the_data(
    make_trainer, tiny_model, token_rows, tmp_path, options, is_streamed, exact_at
):
    rows = token_rows(20)
    if is_streamed:
        rows = rows.to_iterable_dataset()
    expected = weights_of(make_trainer, tiny_model, rows, **options)
    found = set()
    for step in (2, 5, 7):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        folder = str(tmp_path / f"resumed-{step}")
        weights = weights_of(make_trainer, tiny_model, rows, resume=str(checkpoint), output_dir=folder, **options)
        if all(torch.equal(weights[name], tensor) for name, tensor in expected.items()):
            found.add(step)
    assert found == exact_at


def test_a_checkpoint_with_other_names_than_the_modules_resumes_exactly(make_trainer, tiny_model, tmp_path):
    def run(resume=None, **options):
        student = tiny_model("mixtral", seed=5)
        trainer = make_trainer(trainer_args={"model": student}, **{**OPTIONS, "save_total_limit": None, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    expected = run(max_steps=3)
    resumed = run(str(tmp_path / "run" / "checkpoint-1"), max_steps=3, output_dir=str(tmp_path / "resumed"))
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_the_best_checkpoint_with_other_names_than_the_modules_is_loaded(make_trainer, tiny_model, token_rows):
    student = tiny_model("mixtral", seed=5)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    # The entropy rises, so the lowest is that of the first checkpoint, and the last weights are others.
    lowest = {"metric_for_best_model": "student_entropy", "greater_is_better": False}
    trainer = make_trainer(
        trainer_args={"model": student, "eval_dataset": token_rows(4)},
        **{**OPTIONS, "save_total_limit": None, **best, **lowest},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = type(student).from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(trainer.model.state_dict(), saved.state_dict(), rtol=0, atol=0)

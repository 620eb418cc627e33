"""A run that was killed goes on as if it had not been."""

import signal

import pytest
import torch

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


# 20 rows in windows of 4 make 5 steps an epoch: in the middle of the first, at its end, in the middle of the second.
@pytest.mark.parametrize("die_at", [2, 5, 7])
def test_resumed_run_ends_with_the_weights_of_the_unbroken_one(run_apart, tiny_model, die_at):
    def student():
        return tiny_model(attention_dropout=0.2)

    process, unbroken, expected = run_apart("unbroken", student=student(), **OPTIONS)
    assert unbroken is not None, process.stderr
    shares = {entry["on_policy_share"] for entry in unbroken["log"] if "on_policy_share" in entry}
    assert len(shares) > 1  # on- and off-policy samples are mixed

    process, nothing, _ = run_apart("killed", student=student(), die_at=die_at, **OPTIONS)
    assert process.returncode == -signal.SIGKILL
    assert nothing is None
    process, resumed, weights = run_apart("killed", resume=True, **OPTIONS)
    assert resumed is not None, process.stderr

    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert resumed["evaluation"]["eval_loss"] == unbroken["evaluation"]["eval_loss"]


def test_dropout_changes_the_run_above(run_apart, tiny_model):
    weights = []
    for name, disable_dropout in (("with", False), ("without", True)):
        student = tiny_model(attention_dropout=0.2)
        _, result, tensors = run_apart(name, student=student, **{**OPTIONS, "disable_dropout": disable_dropout})
        assert result is not None
        weights.append(tensors)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

"""Two processes over gloo do what one does."""

import pytest
import torch

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "train_sampling_strategy": "sequential",
    "per_device_eval_batch_size": 2,
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


def steps(result):
    return [entry for entry in result["log"] if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("tied", "extra"),
    [
        (True, {"evaluates_first": True}),
        (False, {"gradient_checkpointing": True}),
        (False, {"evaluates_stream": True, "gradient_accumulation_steps": 2, "ce_weight": 0.3, "eval_on_policy": True}),
    ],
    ids=["tied", "untied-checkpointing", "untied-accumulation-cross-entropy"],
)
def test_two_ranks_train_and_evaluate_like_one(full_run, tiny_model, tmp_path, tied, extra):
    def student():
        return tiny_model(tie_word_embeddings=tied)

    options = {**OPTIONS, "lmbda": 0.5, **extra}
    one, expected, _ = full_run(tmp_path / "one", student=student(), per_device_train_batch_size=4, **options)
    two, actual, process = full_run(
        tmp_path / "two", ranks=2, student=student(), per_device_train_batch_size=2, **options
    )
    assert two is not None, process.stderr

    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(steps(one), steps(two), strict=True):
        for metric in ("loss", "on_policy_share", "completion_length", "student_entropy", "top_token_agreement"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
    # 7 rows do not divide evenly over ranks and batches.
    for metric, value in one["evaluation"].items():
        if "runtime" not in metric and "per_second" not in metric and "preparation" not in metric:
            assert two["evaluation"][metric] == pytest.approx(value, rel=1e-4), metric

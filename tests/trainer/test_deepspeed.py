"""Two ranks under DeepSpeed, on a CPU over gloo, do the same as one without it."""

from pathlib import Path

import pytest
import torch

from tests.versions import IN_ORDER

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".cache" / "deepspeed"
"""Where `make test` puts DeepSpeed: beside the environment, since it is imported wherever it is installed."""

pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs DeepSpeed in .cache/deepspeed: run `make test`")

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "no",
    "learning_rate": 0.1,
    **IN_ORDER,
    "per_device_eval_batch_size": 2,
    "max_grad_norm": 0.0,
    "lmbda": 0.5,
}


def zero(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


ENVIRONMENT = {
    "ACCELERATE_USE_DEEPSPEED": "true",  # as `accelerate launch` sets it
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{ROOT}:{PACKAGE}",
}


def by_two_ranks(full_run, folder, stage, student=None, *, config=None, **options):
    """Run two ranks under DeepSpeed; `config` adds to its configuration."""
    return full_run(
        folder,
        ranks=2,
        student=student,
        environment=ENVIRONMENT,
        per_device_train_batch_size=2,
        deepspeed=zero(stage) | (config or {}),
        **options,
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_with_a_teacher_by_name_train_like_one(full_run, tiny_model, tmp_path, stage):
    student = tiny_model(tie_word_embeddings=False)
    options = {**OPTIONS, "optim": "sgd", "names_teacher": True}
    one, expected, _ = full_run(tmp_path / "one", student=student, per_device_train_batch_size=4, **options)
    two, actual, process = by_two_ranks(full_run, tmp_path / "two", stage, student, **options)
    assert two is not None, process.stderr
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    assert max((expected[name] - weight).abs().max() for name, weight in student.state_dict().items()) > 1e-3
    for first, second in zip(one["log"], two["log"], strict=True):
        for metric in {"loss", "completion_length", "eval_loss"} & first.keys():
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric


def test_each_gradient_counts_once_where_halves_accumulate_in_float32(full_run, tiny_model, tmp_path):
    student = tiny_model(tie_word_embeddings=False)
    options = {**OPTIONS, "optim": "sgd", "lmbda": 0.0, "bf16": True, "gradient_accumulation_steps": 2, "max_steps": 2}
    options["learning_rate"] = 1.0  # so that halves' rounding of the weights is small beside their change
    _, expected, _ = full_run(tmp_path / "one", student=student, per_device_train_batch_size=4, **options)
    halves = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    two, actual, process = by_two_ranks(full_run, tmp_path / "two", 1, student, config=halves, **options)
    assert two is not None, process.stderr
    start = student.state_dict()
    moves = [torch.cat([(after[name].float() - start[name]).ravel() for name in start]) for after in (actual, expected)]
    assert moves[0].norm().item() == pytest.approx(moves[1].norm().item(), rel=0.1)


def test_values_that_are_not_finite_end_the_run_before_the_step_that_a_backward_takes(full_run, tmp_path):
    two, _, process = by_two_ranks(
        full_run, tmp_path / "two", 2, is_non_finite=True, **{**OPTIONS, "lmbda": 0.0, "optim": "sgd"}
    )
    assert two is None
    assert process.stderr.count("GKDNumericsError, weights changed: False") == 2


def test_a_sharded_teacher_is_refused(full_run, tmp_path):
    two, _, process = by_two_ranks(full_run, tmp_path / "two", 3, **OPTIONS)
    assert two is None
    assert "pass the teacher by name, which loads all of it" in process.stderr

"""Teachers that run the student, in training runs."""

import pytest
import torch

from tests.trainer.run import FSDP
from tests.trainer.test_deepspeed import ENVIRONMENT, PACKAGE, zero
from tests.versions import IN_ORDER

needs_deepspeed = pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs DeepSpeed in .cache/deepspeed")

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    **IN_ORDER,
    "per_device_eval_batch_size": 2,
    "lmbda": 0.5,
    "gradient_checkpointing": True,
    "self_teacher_ema_decay": 0.5,
}


@pytest.fixture(scope="module")
def one_rank(full_run, tiny_model, tmp_path_factory):
    """The runs of one rank, by the teacher."""
    runs = {}

    def run(source):
        if source not in runs:
            folder = tmp_path_factory.mktemp("one") / source
            student = tiny_model(tie_word_embeddings=False)
            runs[source] = full_run(
                folder, student=student, per_device_train_batch_size=4, self_teacher=source, **OPTIONS
            )[:2]
        return runs[source]

    return run


@pytest.mark.parametrize(
    ("source", "sharding"),
    [
        ("ema", {}),
        ("base", FSDP),
        ("ema", FSDP),
        pytest.param("base", {"deepspeed": zero(3)}, marks=needs_deepspeed),
        pytest.param("ema", {"deepspeed": zero(3)}, marks=needs_deepspeed),
    ],
    ids=["ema-ddp", "base-fsdp", "ema-fsdp", "base-zero3", "ema-zero3"],
)
def test_two_ranks_train_like_one(one_rank, full_run, tiny_model, tmp_path, source, sharding):
    expected_result, expected = one_rank(source)
    result, actual, process = full_run(
        tmp_path / "two",
        ranks=2,
        student=tiny_model(tie_word_embeddings=False),
        environment=ENVIRONMENT if "deepspeed" in sharding else None,
        per_device_train_batch_size=2,
        self_teacher=source,
        **{**OPTIONS, **sharding},
    )
    assert result is not None, process.stderr
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(expected_result["log"], result["log"], strict=True):
        for metric in {"loss", "eval_loss", "teacher_entropy"} & first.keys():
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric

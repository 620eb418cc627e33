"""A small trainer, and rows for it."""

import random

import pytest
from datasets import Dataset

from gkd_trainer import GKDConfig, GKDTrainer

STOP = 2


def make_rows(count=16, vocab=360, seed=0, longest=9):
    """Token rows of a prompt and a completion that ends with the stop token."""
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [numbers.randrange(4, vocab) for _ in range(numbers.randrange(2, longest))]
        completion = [numbers.randrange(4, vocab) for _ in range(numbers.randrange(1, longest))] + [STOP]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return rows


@pytest.fixture
def token_rows():
    """Make a data set of token rows."""
    return lambda count=16, **options: Dataset.from_list(make_rows(count, **options))


@pytest.fixture
def config(tmp_path):
    """Make a configuration for a run of a few steps on the CPU."""

    def make(config_class=GKDConfig, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "max_new_tokens": 6,
            "max_length": 64,
            "lmbda": 0.0,
        }
        return config_class(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(config, tiny_model, token_rows, byte_level):
    """Make a trainer of a tiny student and a wider tiny teacher on token rows; options go to GKDConfig."""

    def make(*, trainer_class=GKDTrainer, trainer_args=None, **options):
        arguments = {
            "train_dataset": token_rows(),
            "processing_class": byte_level(),
            **(trainer_args or {}),
        }
        if "teacher" not in arguments:
            arguments.setdefault("teacher_model", tiny_model(hidden=48, seed=1))
        if "model" not in arguments and "model_init" not in arguments:
            arguments["model"] = tiny_model()
        arguments.setdefault("args", config(**options))
        return trainer_class(**arguments)

    return make

"""A small trainer, and rows for it."""

import json
import random

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file

from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer
from gkd_trainer.trainer.caching import cache_predictions
from gkd_trainer.trainer.ranks import Ranks
from tests.forks import run_ranks
from tests.trainer.run import main as train

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


class FirstOfTwoRanks(Ranks):
    """The first of two ranks; `other_says` is what the second one says in each exchange, in their order.

    An exchange beyond those fails. `said` is what the first one said.
    """

    size, index = 2, 0

    def __init__(self, accelerator, other_says):
        super().__init__(accelerator)
        self.other_says, self.said = list(other_says), []

    def _exchanged(self, tensor):
        self.said.append(tensor.tolist())
        return torch.full_like(tensor, self.other_says.pop(0))

    def sum(self, tensor):
        return tensor + self._exchanged(tensor)

    def gather(self, tensor):
        return torch.cat([tensor.reshape(-1), self._exchanged(tensor).reshape(-1)])


@pytest.fixture
def accelerator():
    """An Accelerator of one process on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer before
    return Accelerator(cpu=True)


@pytest.fixture
def ranks(accelerator):
    """The one rank of this process."""
    return Ranks(accelerator)


@pytest.fixture
def two_ranks(accelerator):
    """Make the first of two ranks; see FirstOfTwoRanks."""
    return lambda *other_says: FirstOfTwoRanks(accelerator, other_says)


@pytest.fixture
def token_rows():
    """Make a dataset of token rows."""
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


@pytest.fixture
def cached(config, tiny_model, token_rows, byte_level, tmp_path):
    """Cache what a teacher says of rows, and return the folder."""

    def make(teacher=None, rows=None, *, name="cache", tokenizer=None, **options):
        folder = str(tmp_path / name)
        caching = {
            key: options.pop(key) for key in ("kind", "shard_mb", "batch_size", "student", "part") if key in options
        }
        cache_predictions(
            teacher or FrozenTeacher(tiny_model(hidden=48, seed=1)),
            token_rows() if rows is None else rows,
            folder,
            config(**options),
            processing_class=tokenizer or byte_level(),
            **caching,
        )
        return folder

    return make


@pytest.fixture(scope="session")
def full_run(tiny_model):
    """Train as run.py does, and return its result, its weights, and the process where it had one of its own.

    That it has where there are several ranks, or where it is to die. A run in a folder that exists goes on in it.
    """

    def run(folder, *, ranks=1, student=None, environment=None, **options):
        if not folder.exists():
            (student or tiny_model()).save_pretrained(folder / "student")
            tiny_model(hidden=48, seed=1).save_pretrained(folder / "teacher")
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(20))))
        (folder / "options.json").write_text(json.dumps(options))
        process = None
        if ranks == 1 and not {"die_at", "die_in_save"} & options.keys():
            train(folder)
        else:
            process = run_ranks("tests.trainer.run", folder, ranks=ranks, environment=environment)
        if not (folder / "result.json").exists():
            return None, None, process
        weights = next((folder / "result").glob("*model.safetensors"))  # of an adapter, or of all
        return json.loads((folder / "result.json").read_text()), load_file(weights), process

    return run

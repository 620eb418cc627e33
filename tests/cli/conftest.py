"""A student, a teacher and rows, as given in the command's options."""

import datasets
import pytest

from gkd_trainer.cli import main
from tests.cli.command import ROWS, write_rows


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pair(tmp_path, tiny_model, byte_level):
    """The options that name a student, a wider teacher and the output folder."""
    tokenizer = byte_level()
    for name, hidden, seed in (("student", 32, 0), ("teacher", 48, 1)):
        tiny_model(hidden=hidden, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    paths = {"--model": "student", "--teacher": "teacher", "--output_dir": "output"}
    return [text for option, name in paths.items() for text in (option, str(tmp_path / name))]


@pytest.fixture
def rows_file(tmp_path):
    """A JSON-lines file of four rows."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def data(rows_file):
    """The options that name a dataset and keep a run short."""
    return ["--dataset", str(rows_file), "--max_new_tokens", "4", "--max_steps", "2", "--report_to", "none"]


@pytest.fixture
def given_to_trainer(monkeypatch):
    """Run main up to the trainer, and return what the trainer is given."""
    given = {}

    class TrainerReachedError(Exception):
        pass

    def record(model, args, **kwargs):
        given.update(model=model, args=args, **kwargs)
        raise TrainerReachedError

    def run(*argv):
        monkeypatch.setattr("gkd_trainer.trainer.GKDTrainer", record)
        with pytest.raises(TrainerReachedError):
            main(["train", *map(str, argv)])
        return given

    return run

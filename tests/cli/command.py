"""Shared by the tests of the command: rows, files, and the command's exit."""

import pytest
import yaml
from datasets import Dataset

from gkd_trainer.cli import main

ROWS = [{"prompt": f"{word} and one is", "completion": f" {word} one"} for word in ("one", "two", "three", "four")]


def write_rows(path, rows):
    dataset = Dataset.from_list(rows)
    {".csv": dataset.to_csv, ".parquet": dataset.to_parquet}.get(path.suffix, dataset.to_json)(str(path))
    return path


def write_yaml(path, **options):
    path.write_text(yaml.safe_dump(options))
    return path


def exit_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    return stopped.value.code, capsys.readouterr().err

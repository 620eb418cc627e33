"""A command as each of several ranks runs it; its arguments are in the `command.json` of a folder."""

import json

import datasets

from gkd_trainer.cli import main as run


def main(folder):
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    run(json.loads((folder / "command.json").read_text()))

"""Run what is missing of a study, in several processes."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby
from pathlib import Path

import datasets
import torch
from filelock import FileLock, Timeout
from rich.console import Console

from experiments.arms import ARMS, TEACHER, is_timed
from experiments.draft_study import DraftStudy
from experiments.errand_study import ErrandStudy
from experiments.lines import Lines, commit
from experiments.studies import Run, Study
from experiments.training import trained

STUDIES = ("errands", "drafts")


def run_all(options: argparse.Namespace, name: str) -> None:
    """Run what is missing of a study, in several processes of one thread each."""
    options.results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.results / f"{name}.lock", blocking=False):
            _run_missing(options, name)
    except Timeout:
        raise SystemExit(
            f"another process is adding to {options.results / name}.jsonl: wait for it, or end it"
        ) from None


def _run_missing(options: argparse.Namespace, name: str) -> None:
    console, lines, study = Console(), Lines(options.results / f"{name}.jsonl"), study_of(options, name)
    runs = [run for run in study.runs(options.grid) if lines.find(**run.key) is None]
    console.print(f"{name}: {len(runs)} runs to do")
    # Those that train for as long as another one come after it, and need its result.
    for _, due in groupby(runs, key=lambda run: is_timed(run.arm)):
        batch = list(due)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context, initializer=_begin_process) as pool:
            for run in pool.map(do, [options] * len(batch), [name] * len(batch), batch):
                console.print(f"{name}: {run.arm}, seed {run.seed}, {dict(run.factors)} done")


def _begin_process() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    commit()  # of the code that this process runs, whatever is committed meanwhile


def do(options: argparse.Namespace, name: str, run: Run) -> Run:
    """Do one run, add its result, and return it."""
    lines, study = Lines(options.results / f"{name}.jsonl"), study_of(options, name)
    if run.arm == TEACHER:
        setting = study.setting(run)
        spent = {"step": 0, "tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}
        lines.add({**run.key, "trained_steps": 0, "points": [{**spent, **setting.measure(setting.teacher)}]})
        return run
    arm, steps = ARMS[run.arm], run.steps
    if arm.as_long_as is not None:
        steps = steps_in_its_time(lines, run, arm.as_long_as)
    _, result = trained(study.setting(run), arm, run.seed, steps)
    lines.add({**run.key, "trained_steps": steps, **result})
    return run


def steps_in_its_time(lines: Lines, run: Run, reference: str) -> int:
    """Return the steps for which plain SFT takes the processor time of another arm, by the results of both."""
    key = {**run.key, "arm": reference}
    other, own = lines.find(**key), lines.find(**{**key, "arm": "sft"})
    if other is None or own is None:
        raise SystemExit(f"{run.arm} needs the results of {reference} and sft for seed {run.seed}")
    per_step = own["points"][-1]["cpu_seconds"] / own["trained_steps"]
    return round(other["points"][-1]["cpu_seconds"] / per_step)


def study_of(options: argparse.Namespace, name: str) -> Study:
    """Return a study by its name, the same one in the same process."""
    return _study(name, options.models / name, options.pair)


@cache
def _study(name: str, folder: Path, pair: Path) -> Study:
    return ErrandStudy(folder) if name == "errands" else DraftStudy(folder, pair)

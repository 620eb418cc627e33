"""Run the experiments, or make tables and plots of their results.

    python -m experiments run --grid small
    python -m experiments report --results experiments/results

A run whose result is in the file already is left out, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import torch
from rich.console import Console

from experiments.arms import ARMS
from experiments.draft_study import DraftStudy
from experiments.errand_study import ErrandStudy
from experiments.lines import Lines
from experiments.report import write_report
from experiments.studies import Run, Study
from experiments.training import trained

STUDIES = ("errands", "drafts")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse_options(argv)
    if options.command == "run":
        for name in options.studies:
            run_all(options, name)
    for name in options.studies:
        if (options.results / f"{name}.jsonl").exists():
            write_report(study_of(options, name), Lines(options.results / f"{name}.jsonl").read(), options.results)


def run_all(options: argparse.Namespace, name: str) -> None:
    """Run what is missing of a study, in several processes of one thread each."""
    console, lines, study = Console(), Lines(options.results / f"{name}.jsonl"), study_of(options, name)
    runs = [run for run in study.runs(options.grid) if lines.find(**run.key) is None]
    console.print(f"{name}: {len(runs)} runs to do")
    # Those that train for as long as another one need its result.
    for is_timed in (False, True):
        due = [run for run in runs if (ARMS[run.arm].as_long_as is not None) == is_timed]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context, initializer=_begin_process) as pool:
            for run in pool.map(_do, [options] * len(due), [name] * len(due), due):
                console.print(f"{name}: {run.arm}, seed {run.seed}, {dict(run.factors)} done")


def _begin_process() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)


def _do(options: argparse.Namespace, name: str, run: Run) -> Run:
    lines, study = Lines(options.results / f"{name}.jsonl"), study_of(options, name)
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
    """Return a study by its name."""
    if name == "errands":
        return ErrandStudy(options.models / name)
    return DraftStudy(options.models / name, options.pair)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--grid", choices=["small", "full"], default="small")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--results", type=Path, default=Path("experiment_output"), help="folder of the results")
    parser.add_argument("--models", type=Path, default=Path(".cache/experiments"), help="folder of what runs share")
    parser.add_argument("--pair", type=Path, default=Path(".cache/smollm2"), help="folder of the SmolLM2 pair")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

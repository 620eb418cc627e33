"""Run the experiments, or make tables and plots of their results.

    python -m experiments run --grid small
    python -m experiments report --results experiments/results

A run whose result is in the file already is left out, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.lines import Lines
from experiments.report import write_report
from experiments.runner import STUDIES, run_all, study_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse_options(argv)
    if options.command == "run":
        for name in options.studies:
            run_all(options, name)
    for name in options.studies:
        if (options.results / f"{name}.jsonl").exists():
            write_report(study_of(options, name), Lines(options.results / f"{name}.jsonl").read(), options.results)


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

"""The command line of the stages: run one, record results in the documentation, carry packages along."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.cells import Cell, Where, run_stage

ROOT = Path(__file__).parents[2]
STAGES = {
    "checks": "what the card can do, the tests marked `gpu`, memory errors",
    "loss": "the divergence beside its floor and its peers",
    "steps": "whole training steps",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(arguments)
    options.run(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Checks and measurements on a GPU.")
    commands = whole.add_subparsers(required=True, metavar="command")
    for stage, summary in STAGES.items():
        command = commands.add_parser(stage, help=summary, description=f"Measure {summary}; write {stage}.json.")
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--small", action="store_true", help="tiny sizes, to try the code and not to measure")
        command.add_argument("--results", type=Path, default=ROOT / "build" / "gpu", help="folder of the JSON files")
        command.add_argument("--minutes", type=float, default=8.5, help="skip what no longer fits into these")
        command.add_argument("--wheels", type=Path, help="folder from `gather`: use what is not installed from it")
        command.set_defaults(run=_run, stage=stage)
    return whole


def _run(options: argparse.Namespace) -> None:
    where = Where(options.device, options.small)
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if options.device == "cuda":
        _require_cuda()
    else:  # the kernels run in Triton's interpreter, and what torch would compile runs as it is written
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    stage = importlib.import_module(f"benchmarks.gpu.{options.stage}")
    cells: Callable[[Where], list[Cell]] = stage.cells
    if not run_stage(options.stage, cells(where), where, options.results, options.minutes):
        sys.exit(f"some cells of {options.stage} failed: see {options.results / options.stage}.json")


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that this torch can use; to try the code without: --device cpu --small")

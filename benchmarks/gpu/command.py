"""The command line of the stages: run one, record results in the documentation, carry packages along."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import Cell, Where, run_stage
from benchmarks.gpu.page import keep, read, show, write_page
from benchmarks.gpu.wheels import COMPILED, gather, install

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
STAGES = {
    "checks": "what the card can do, the tests marked `gpu`, memory errors",
    "loss": "the divergence beside its floor and its peers",
    "steps": "whole training steps",
}

PLATFORMS = [f"manylinux_{version}_x86_64" for version in ("2_28", "2_27", "2_17")] + ["manylinux2014_x86_64"]

QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
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
    _add_gather(commands)
    record = commands.add_parser(
        "record",
        help="keep results, and show them in docs/performance.md",
        description="Copy a GPU's results to benchmarks/gpu/results, and write their tables into docs/performance.md.",
    )
    record.add_argument("results", type=Path, nargs="?", help="folder of new JSON files; none writes only the page")
    record.set_defaults(run=_record)
    return whole


def _record(options: argparse.Namespace) -> None:
    if options.results is not None:
        keep(options.results)
    write_page()


def _add_gather(commands: Any) -> None:
    command = commands.add_parser(
        "gather",
        help="download packages for a machine without a network",
        description="Download what GKDTrainer and the peers of the loss need, except what is large and compiled: a "
        "machine for GPUs has torch, Triton, transformers, peft, accelerate, pyarrow and pandas.",
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    command.add_argument("folder", type=Path)
    command.add_argument("--python", default=here, help=f"the other machine's version of Python; {here} by default")
    command.add_argument("--platforms", nargs="+", default=PLATFORMS, help="those that a compiled wheel may name")
    command.add_argument(
        "--all", action="store_true", help=f"{', '.join(COMPILED)} too (68 MB), without which TRL is not measured"
    )
    command.add_argument("--also", nargs="+", default=[], help="further packages")
    command.set_defaults(run=_gather)


def _gather(options: argparse.Namespace) -> None:
    also = [*options.also, *(COMPILED if options.all else ())]
    wheels = gather(options.folder, options.python, options.platforms, also, CONSTRAINTS)
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB: carry {options.folder} along, and give the stages --wheels")


def _run(options: argparse.Namespace) -> None:
    where = Where(options.device, options.small)
    os.environ |= QUIET
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # GKDTrainer refuses DataParallel
    if options.device == "cuda":
        _require_cuda()
    else:  # the kernels run in Triton's interpreter, and what torch would compile runs as it is written
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    if options.wheels is not None:
        _use(options.wheels)
    stage = importlib.import_module(f"benchmarks.gpu.{options.stage}")
    cells: Callable[[Where], list[Cell]] = stage.cells
    is_right = run_stage(options.stage, cells(where), where, options.results, options.minutes)
    file = options.results / f"{options.stage}.json"
    show(read(file))
    if not is_right:
        sys.exit(f"some cells of {options.stage} failed: {file} says why")


def _use(wheels: Path) -> None:
    """Make what is missing importable, in this process and in those that it starts."""
    folder = tempfile.mkdtemp(prefix="gpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # dill, by which datasets recognises functions, would pickle all that is in modules under another name.
    target = Path(folder) / "site-packages"
    names = install(wheels, target)
    print(f"from {wheels}: {', '.join(names) or 'nothing, as all of it is installed'}")
    sys.path.append(str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(target)]))


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that this torch can use; to try the code without: --device cpu --small")

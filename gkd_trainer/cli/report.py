"""`gkd-trainer report`: one HTML file about a run, or about several that continue one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gkd_trainer.cli.parser import PlainParser
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.quiet import quiet_imports

SUMMARY = "write a run's curves and completions to one HTML file"

FILE_NAME = "_report.html"
"""The default name. Trainer leaves files that begin with _ out of what it pushes to the hub."""


def run(arguments: Sequence[str]) -> None:
    """Write the report, and print where it is.

    Raises:
        SystemExit: With status 2, for options that can't be parsed; with status 0, after help.
        GKDDataError: There is no run in a folder.
        GKDConfigError: The file can't be written.
    """
    parser = PlainParser(
        prog="gkd-trainer report",
        description="Write a run's curves and completions to one self-contained HTML file. "
        "Several folders are stages: runs that each continued with the previous run's student.",
    )
    parser.add_argument("output_dirs", metavar="OUTPUT_DIR", nargs="+", help="the output_dir of a run")
    parser.add_argument("--output_file", metavar="FILE", help=f"the file (default: {FILE_NAME} in the last OUTPUT_DIR)")
    options = parser.parsed(arguments)
    path = Path(options.output_file or Path(options.output_dirs[-1]) / FILE_NAME)
    if options.output_file:
        require_folder_of(path)
    with quiet_imports():
        from gkd_trainer.report.document import run_page
        from gkd_trainer.report.run import read_run
    names = distinct_names([os.path.realpath(folder) for folder in options.output_dirs])
    runs = [replace(read_run(folder), name=name) for folder, name in zip(options.output_dirs, names, strict=True)]
    write_page(path, run_page(runs))


def distinct_names(models: Sequence[str]) -> list[str]:
    """Return a name for each model or folder, with as much of its path as tells it apart from the others.

    Folders of different runs may share a name, such as checkpoint-100. What is given twice is numbered.
    """
    from gkd_trainer.report.model_card import is_on_hub, public_name

    paths = [Path(os.path.abspath(model)) for model in models]
    names = dict(zip(paths, map(public_name, models), strict=True))
    folders = [path for path, model in zip(paths, models, strict=True) if not is_on_hub(model)]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        taken = list(names.values())
        names |= {path: str(Path(*path.parts[-depth:])) for path in folders if taken.count(names[path]) > 1}
    return [
        names[path] if paths.count(path) == 1 else f"{names[path]} ({paths[: index + 1].count(path)})"
        for index, path in enumerate(paths)
    ]


def require_folder_of(path: Path) -> None:
    """Raise GKDConfigError if a file's folder is missing, so that this is known before any work."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise GKDConfigError(f"--output_file: expected a file in a folder that exists; got {path}")


def write_page(path: Path, page: str) -> None:
    """Write a page, and print where it is and its size; raise GKDConfigError if that fails."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise GKDConfigError(f"--output_file: expected a file that can be written; got {path}: {error}") from error
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

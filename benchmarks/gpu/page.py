"""The results of the stages as tables: in a terminal, and in docs/performance.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.gpu.tables import STAGES, Table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
"""The results that docs/performance.md shows."""

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- Written by `python -m benchmarks.gpu record`: begin -->", "<!-- end -->"


def read(file: Path) -> dict[str, Any]:
    """Return the results of a stage."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def show(results: Mapping[str, Any]) -> None:
    """Print the tables of a stage."""
    console = Console(width=160)
    for table in STAGES[results["stage"]](results):
        printed = RichTable(title=table.title, title_justify="left")
        for index, name in enumerate(table.header):
            printed.add_column(name, justify="left" if index == 0 else "right")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed, markup=False)


def keep(folder: Path, kept: Path = RESULTS) -> None:
    """Copy the results in a folder to those that the page shows.

    Raises:
        SystemExit: It has none, or some that were not measured in full size, by the kernels, on a GPU.
    """
    files = [file for stage in STAGES if (file := folder / f"{stage}.json").is_file()]
    if not files:
        raise SystemExit(f"{folder} must hold results of a stage ({', '.join(STAGES)}); got none: run one first")
    for file in files:
        results = read(file)
        if results["device"] != "cuda" or results["is_small"]:
            raise SystemExit(f"{file} was made to try the code (on {results['device']}), and its figures mean nothing")
        if not results["about"].get("has_kernels"):
            raise SystemExit(
                f"{file} was measured without Triton's kernels, and its figures are not those of the divergence on a "
                "GPU: let Triton launch kernels there (apt install gcc python3-dev), and run the stage again"
            )
    kept.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, kept)


def section(kept: Path = RESULTS) -> str:
    """Return the page's section on what was measured on a GPU, from the results that are kept."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages: list[dict[str, Any]] = []
    for stage, tables_of in STAGES.items():
        file = kept / f"{stage}.json"
        if file.is_file():
            results = read(file)
            stages.append({"results": results, "about": results["about"], "tables": tables_of(results)})
    missing = [stage for stage in STAGES if not (kept / f"{stage}.json").is_file()]
    template = environment.get_template("section.md.jinja")
    return template.render(stages=stages, missing=missing, markdown=markdown).strip()


def write_page(page: Path = PAGE, kept: Path = RESULTS) -> None:
    """Replace the section in a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} must hold the lines {BEGIN!r} and {END!r}, between which the section is written")
    page.write_text(f"{before}{BEGIN}\n\n{section(kept)}\n\n{END}{after}", encoding="utf-8")


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines: list[Sequence[str]] = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

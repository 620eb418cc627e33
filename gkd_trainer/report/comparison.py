"""Several students side by side: a table in the terminal, and a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gkd_trainer.report.measuring import MEASURES, Measure, MeasuredStudent, Sample
from gkd_trainer.report.page import map_values, rendered
from gkd_trainer.report.stages import print_samples


@dataclass(frozen=True)
class Bar:
    """A student's value of a measure, and the length of its bar as a share of the longest."""

    name: str
    value: float | None
    share: float
    is_best: bool


def print_comparison(
    students: Sequence[MeasuredStudent], teacher: str, n_rows: int, console: Console, *, note: str = ""
) -> None:
    """Print a row for each measure and a column for each student, then their samples, prompt by prompt.

    `note` says which rows were left out.
    """
    caption = f"Own text: greedy completions. {note}".strip()
    table = Table(title=Text(f"Compared with {teacher} on {n_rows} rows"), caption=Text(caption))
    table.add_column("")
    for student in students:
        table.add_column(Text(student.name), justify="right", overflow="fold")
    for measure, bars in measure_bars(students):
        cells = [
            Text("–" if bar.value is None else f"{bar.value:.3f}", style="bold" if bar.is_best else "") for bar in bars
        ]
        table.add_row(f"{measure.name} ({measure.unit})", *cells)
    console.print(table)
    for samples in zip(*(student.samples for student in students), strict=True):
        texts = {
            _named(student, sample): (sample.text, sample.is_finished)
            for student, sample in zip(students, samples, strict=True)
        }
        print_samples(samples[0].prompt, texts, console)


def comparison_page(students: Sequence[MeasuredStudent], teacher: str, n_rows: int, *, note: str = "") -> str:
    """Return the comparison as HTML; `note` says which rows were left out."""
    sides = {
        f"{row}-{column}": [_without_prompt(sample, _named(student, sample))]
        for column, student in enumerate(students)
        for row, sample in enumerate(student.samples)
    }
    prompts = [
        {"text": sample.prompt, "sides": [f"{row}-{column}" for column in range(len(students))]}
        for row, sample in enumerate(students[0].samples)
    ]
    return rendered(
        "compare.html",
        f"Students of {teacher}",
        n_rows=n_rows,
        note=note,
        measures=measure_bars(students),
        students=students,
        prompts=prompts,
        data={"sides": sides, "unit": "nats"},
    )


def measure_bars(students: Sequence[MeasuredStudent]) -> list[tuple[Measure, list[Bar]]]:
    """Return the measures that any student has, with a bar for each student."""
    shown = []
    for key, measure in MEASURES.items():
        values = [student.measures.get(key) for student in students]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if not any(value is not None for value in values):
            continue
        longest = 1.0 if measure.unit.startswith("share") else max(finite, default=0.0)
        best = None
        if measure.is_more_better is not None and len(set(finite)) > 1:
            best = max(finite) if measure.is_more_better else min(finite)
        bars = [
            Bar(student.name, value, _share(value, longest), value is not None and value == best)
            for student, value in zip(students, values, strict=True)
        ]
        shown.append((measure, bars))
    return shown


def _share(value: float | None, longest: float) -> float:
    if value is None or longest <= 0:
        return 0.0
    return min(1.0, max(0.0, value / longest))


def _without_prompt(sample: Sample, caption: str) -> dict[str, Any]:
    """Return a sample for the page, which has the prompt above all of its completions."""
    if sample.tokens is None:
        return {"caption": caption, "prompt": "", "isCut": False, "tokens": []}
    return {**map_values(sample.tokens, caption), "prompt": ""}


def _named(student: MeasuredStudent, sample: Sample) -> str:
    if sample.is_right is None:
        return student.name
    return f"{student.name} ({'right' if sample.is_right else 'wrong'})"

"""A student's change from stage to stage: a table, a plot of each measure over the steps, and samples to read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.pieces import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measures = Mapping[str, float]
"""The measurements of a student at one point: {"forward KL": 8.6, "agreement": 0.03}."""

Curve = Sequence[tuple[int, Measures]]
"""Measurements at several optimizer steps, in order."""


def print_stages(stages: Mapping[str, Measures], title: str, caption: str = "", console: Console | None = None) -> None:
    """Print one row per measure and one column per stage, with the caption below."""
    table = Table(title=title, caption=caption or None, caption_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    for measure in _measures(stages.values()):
        table.add_row(measure, *(f"{values[measure]:.3f}" for values in stages.values()))
    (console or Console()).print(table)


def print_samples(prompt: str, samples: Mapping[str, tuple[str, bool]], console: Console | None = None) -> None:
    """Print a prompt once, and below it the completion by each model or stage, at full width.

    A sample is its text and whether it ended with a stop token; else it gets an ellipsis. Empty lines are left out.
    """
    console = console or Console()
    console.rule()
    # Text, not str: brackets in a completion are not markup.
    # Readable: a terminal would obey a completion's control characters.
    console.print(Text(readable(prompt), style="bold"))
    for name, (text, is_finished) in samples.items():
        console.print(Text(readable(name), style="cyan"))
        text = re.sub(r"\n\s*\n", "\n", text.strip()) + ("" if is_finished else " …")
        console.print(Padding(Text(readable(text)), (0, 0, 0, 4)))


def plot_curves(curves: Mapping[str, Curve], path: Path, *, logarithmic: Collection[str] = ()) -> None:
    """Write a plot with one panel per measure, in which every run has one line over the optimizer steps.

    Args:
        curves: Measurements by name of the run. Steps are counted from the beginning of the first run: a run that
            continues another starts with the other's last point.
        path: The file, in a format that matplotlib writes (.png, .svg, .pdf).
        logarithmic: The measures with a logarithmic axis, so that their last gains show.

    Raises GKDConfigError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    except ImportError as error:
        raise GKDConfigError(
            'plot_curves needs matplotlib: pip install ".[plots]" in a clone of gkd_trainer; '
            f"importing it failed with: {error}"
        ) from error
    measures = _measures(measures for curve in curves.values() for _, measures in curve)
    figure = Figure(figsize=(max(1, len(measures)) * 4.5, 4), layout="constrained")
    for index, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), index + 1)
        _draw(axes, measure, curves)
        if measure in logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, measure: str, curves: Mapping[str, Curve]) -> None:
    for name, curve in curves.items():
        values = [measures[measure] for _, measures in curve]
        # The last value is in the legend: beside the points, the values of two runs would overlap.
        label = f"{name}: {values[-1]:.2f}" if values else name
        axes.plot([step for step, _ in curve], values, marker="o", markersize=4, label=label)
    axes.set(title=measure, xlabel="optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(title="last value")


def _measures(measurements: Iterable[Measures]) -> list[str]:
    return list(next(iter(measurements), {}))

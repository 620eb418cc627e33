"""How a student changed from stage to stage: a table, and a picture beside the curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Stages = Mapping[str, Mapping[str, float]]
"""Measurements by stage, in order: {"before": {"forward KL": 8.6}, "after": {"forward KL": 1.9}}."""


def print_stages(stages: Stages, title: str, console: Console | None = None) -> None:
    """Print one row per measure and one column per stage."""
    table = Table(title=title)
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    for measure in _measures(stages):
        table.add_row(measure, *(f"{values[measure]:.3f}" for values in stages.values()))
    (console or Console()).print(table)


def plot_stages(stages: Stages, histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a picture of the losses of training and of each measure by stage.

    Args:
        stages: Measurements by stage.
        histories: The `trainer.state.log_history` of each run, by its name; drawn one after the other.
        path: The file, of a format that matplotlib writes (.png, .svg, .pdf).
    """
    measures = _measures(stages)
    figure = Figure(figsize=(5 + 2.6 * len(measures), 4), layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(measures), width_ratios=[2, *[1] * len(measures)])
    offset = 0
    for name, history in histories.items():
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        if points:
            curves.plot([offset + step for step, _ in points], [loss for _, loss in points], label=name)
            offset += points[-1][0]
    curves.set(title="Loss while training", xlabel="optimizer step", ylabel="divergence a token, nats", ylim=(0, None))
    if curves.lines:
        curves.legend()
    for axes, measure in zip(bars, measures, strict=True):
        drawn = axes.bar(list(stages), [values[measure] for values in stages.values()], color=_COLORS[: len(stages)])
        axes.bar_label(drawn, fmt="%.2f")
        axes.set_title(measure, fontsize="medium")
        axes.tick_params(axis="x", rotation=30)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


_COLORS = ["#9aa5b1", "#5b8db8", "#2b5d8a", "#123a5c"]


def _measures(stages: Stages) -> list[str]:
    return list(next(iter(stages.values())))

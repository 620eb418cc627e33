"""Tables and plots from lines of results: at equal steps, at equal time, and paired differences with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.arms import ARMS, PAIRS
from experiments.studies import Study

matplotlib.use("Agg")
from matplotlib import pyplot

Result = Mapping[str, Any]
Group = Mapping[str, Mapping[int, Result]]
"""The results of one setting, by arm and seed."""

_RESAMPLES = 10_000


def write_report(study: Study, results: Sequence[Result], folder: Path) -> Path:
    """Write the tables of a study as Markdown, and its plots beside them; return the file."""
    parts = [f"# {study.name}", ""]
    for factors, group in sorted(grouped(results).items()):
        title = ", ".join(f"{name} {value}" for name, value in factors) or "all runs"
        limit = common_time(group)
        parts += [
            f"## {title}",
            "",
            "Means over seeds, after the same number of steps; `sft-longer` takes more.",
            "",
            *table_of_ends(study, group),
            "",
            f"The same after {limit:.0f} s of processor time at most, by the last measurement before.",
            "",
            *table_of_ends(study, group, limit),
            "",
            f"Differences in {study.measures[study.primary]}, paired by seed and prompt, with 95 % intervals.",
            "",
            *table_of_differences(group, limit),
            "",
        ]
        name = "-".join([study.name, *(f"{name}{value}" for name, value in factors)])
        plot(study, group, title, folder / f"{name}.png")
    file = folder / f"{study.name}.md"
    file.write_text("\n".join(parts))
    return file


def grouped(results: Sequence[Result]) -> dict[tuple[tuple[str, int], ...], Group]:
    """Return results by what else varies, then by arm and seed."""
    found: dict[tuple[tuple[str, int], ...], dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        found[tuple(result["factors"].items())][result["arm"]][result["seed"]] = result
    return {factors: {arm: group[arm] for arm in ARMS if arm in group} for factors, group in found.items()}


def common_time(group: Group) -> float:
    """Return the time, in seconds, at which arms are compared: what supervised KD on the data takes for its steps."""
    reference = group.get("fixed-forward") or next(iter(group.values()))
    return float(np.median([result["points"][-1]["cpu_seconds"] for result in reference.values()]))


def point_of(result: Result, limit: float | None = None) -> Mapping[str, Any]:
    """Return the last measurement, or the last within a processor time."""
    points = [point for point in result["points"] if limit is None or point["cpu_seconds"] <= 1.05 * limit]
    last: Mapping[str, Any] = points[-1]
    return last


def table_of_ends(study: Study, group: Group, limit: float | None = None) -> list[str]:
    """Return the rows of a table of the measures by arm."""
    titles = ["arm", "learns from", "seeds", "steps", "s", *study.measures.values()]
    rows = []
    for arm, by_seed in group.items():
        points = [point_of(result, limit) for result in by_seed.values()]
        steps, seconds = (np.mean([point[name] for point in points]) for name in ("step", "cpu_seconds"))
        values = [_mean([point.get(name) for point in points]) for name in study.measures]
        rows.append([arm, ARMS[arm].description, str(len(points)), f"{steps:.0f}", f"{seconds:.0f}", *values])
    return table(titles, rows)


def _mean(values: Sequence[float | None]) -> str:
    """Return a mean for a table; some measures are taken only at the end."""
    if None in values:
        return "–"
    return f"{np.mean(values):.3f}"


def table_of_differences(group: Group, limit: float) -> list[str]:
    """Return the rows of a table of paired differences at equal steps and at equal time."""
    rows = []
    for arm, control in PAIRS:
        seeds = sorted(group.get(arm, {}).keys() & group.get(control, {}).keys())
        if not seeds:
            continue
        cells = []
        for at in (None, limit):
            differences_SP = np.array(
                [
                    np.subtract(*(point_of(group[name][seed], at)["by_prompt"] for name in (arm, control)))
                    for seed in seeds
                ]
            )
            low, high = interval(differences_SP)
            cells.append(f"{differences_SP.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([f"{arm} − {control}", str(len(seeds)), *cells])
    return table(["pair", "seeds", "equal steps", "equal time"], rows)


def interval(differences_SP: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of differences by seed and prompt, drawing both anew (bootstrap).

    Shapes: S seeds, P prompts.
    """
    numbers = np.random.default_rng(seed)
    n_seeds, n_prompts = differences_SP.shape
    seeds_RS = numbers.integers(n_seeds, size=(_RESAMPLES, n_seeds))
    prompts_RP = numbers.integers(n_prompts, size=(_RESAMPLES, n_prompts))
    means_R = [
        differences_SP[seeds_S].mean(axis=0)[prompts_P].mean()
        for seeds_S, prompts_P in zip(seeds_RS, prompts_RP, strict=True)
    ]
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def plot(study: Study, group: Group, title: str, file: Path) -> None:
    """Draw the primary measure against processor time: one curve per arm, the mean over its seeds."""
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    styles = {"fixed": "-", "fresh": "--", "own": "-", "mixed": "-.", "rising": "-.", "sft": ":", "seq": ":"}
    colours = pyplot.get_cmap("tab20").colors
    for index, (arm, by_seed) in enumerate(group.items()):
        curves = [result["points"] for result in by_seed.values()]
        seconds, values = (
            np.mean([[point[name] for point in curve] for curve in curves], axis=0)
            for name in ("cpu_seconds", study.primary)
        )
        style = styles[arm.partition("-")[0]]
        axes.plot(seconds, values, style, color=colours[index % 20], marker="o", markersize=3, label=arm)
    axes.set_xlabel("processor time of training, s")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_ylabel(study.measures[study.primary])
    axes.set_title(f"{study.name}: {title}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]

"""Tables and plots from lines of results: at equal steps, at equal time, and paired differences with intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from experiments.arms import ARMS, LOSS_PAIRS, PAIRS, START, TEACHER
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
        title = ", ".join(f"{name} {value}" for name, value in factors)
        limit = common_time(group)
        parts += [
            f"## {title}",
            "",
            "Means over seeds, after the same number of steps (`sft-longer` takes more); tokens are those learnt from.",
            "",
            *table_of_ends(study, group),
            "",
            *(() if limit is None else _section_at(study, group, limit)),
            *(line for measure in study.decisive for line in _section_of_differences(study, group, limit, measure)),
            *(line for measure in study.kinds for line in _section_of_kinds(study, group, measure)),
        ]
        name = "-".join([study.name, *(f"{name}{value}" for name, value in factors)])
        if not group.keys().isdisjoint(ARMS):
            plot(study, group, title, folder / f"{name}.png")
    file = folder / f"{study.name}.md"
    file.write_text("\n".join(parts))
    return file


def _section_at(study: Study, group: Group, limit: float) -> list[str]:
    return [
        f"The same after {limit:.0f} s of processor time, interpolated between two measurements; an arm that takes "
        "less is shown at its end.",
        "",
        *table_of_ends(study, group, limit),
        "",
    ]


def _section_of_differences(study: Study, group: Group, limit: float | None, measure: str) -> list[str]:
    return [
        f"Differences in {study.measures[measure]}, paired by seed and prompt, with 95 % intervals; by chance, one in "
        "twenty would miss 0.",
        "",
        *table_of_differences(group, limit, measure),
        "",
    ]


def _section_of_kinds(study: Study, group: Group, measure: str) -> list[str]:
    kinds = study.kinds[measure]
    counts = sorted(Counter(kinds).items())
    rows = []
    for arm, by_seed in group.items():
        values_SP = np.array([point_of(result)["by_prompt"][measure] for result in by_seed.values()])
        means = [values_SP[:, [each == kind for each in kinds]].mean() for kind, _ in counts]
        rows.append([arm, *(f"{mean:.3f}" for mean in means)])
    titles = [f"{kind} ({count})" for kind, count in counts]
    return [
        f"{study.measures[measure].capitalize()} by kind of prompt (how many), after the same number of steps.",
        "",
        *table(["arm", *titles], rows),
        "",
    ]


def grouped(results: Sequence[Result]) -> dict[tuple[tuple[str, int], ...], Group]:
    """Return results by the number of steps and what else varies, then by arm and seed.

    Raises ValueError for two results of one run: which of them counts?
    """
    found: dict[tuple[tuple[str, int], ...], dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        factors = {**result["factors"], "steps": result["steps"]}
        by_seed = found[tuple(factors.items())][result["arm"]]
        if result["seed"] in by_seed:
            raise ValueError(
                f"two results of {result['arm']}, seed {result['seed']}, {factors}: delete one of the lines"
            )
        by_seed[result["seed"]] = result
    return {factors: _with_start(group) for factors, group in found.items()}


def _with_start(group: Group) -> Group:
    """Return a group in the order of the tables: the teacher, what all arms start from, and the arms."""
    start = {
        seed: {**result, "points": result["points"][:1]}
        for arm, by_seed in group.items()
        for seed, result in by_seed.items()
        if arm != TEACHER
    }
    with_start = group | ({START: start} if start else {})
    return {arm: with_start[arm] for arm in (TEACHER, START, *ARMS) if arm in with_start}


def common_time(group: Group) -> float | None:
    """Return the time, in seconds, at which arms are compared: what `fixed-forward` takes, the median of its seeds.

    None if that is not there.
    """
    reference = group.get("fixed-forward", {}).values()
    return float(np.median([result["points"][-1]["cpu_seconds"] for result in reference])) if reference else None


def point_of(result: Result, limit: float | None = None) -> Mapping[str, Any]:
    """Return the last measurement, or what it was at a processor time: between two, by linear interpolation.

    What only one of the two has is left out.
    """
    points = result["points"]
    last: Mapping[str, Any] = points[-1]
    if limit is None or last["cpu_seconds"] <= limit:
        return last
    after = next(index for index, point in enumerate(points) if point["cpu_seconds"] > limit)
    before, later = points[after - 1], points[after]
    share = (limit - before["cpu_seconds"]) / (later["cpu_seconds"] - before["cpu_seconds"])
    return {name: _between(value, later[name], share) for name, value in before.items() if name in later}


def _between(value: Any, later: Any, share: float) -> Any:
    """Return what is at a share of the way between two numbers, or two equal collections of numbers."""
    if isinstance(value, Mapping):
        return {name: _between(each, later[name], share) for name, each in value.items()}
    if isinstance(value, list):
        return [_between(one, other, share) for one, other in zip(value, later, strict=True)]
    return value + share * (later - value)


def table_of_ends(study: Study, group: Group, limit: float | None = None) -> list[str]:
    """Return the rows of a table of the measures by arm."""
    titles = ["arm", "learns from", "seeds", "steps", "tokens", "s", *study.measures.values()]
    rows = []
    for arm, by_seed in group.items():
        points = [point_of(result, limit) for result in by_seed.values()]
        steps, tokens, seconds = (
            np.mean([point[name] for point in points]) for name in ("step", "tokens", "cpu_seconds")
        )
        values = [_mean([point.get(name) for point in points]) for name in study.measures]
        description = ARMS[arm].description if arm in ARMS else ""
        rows.append([arm, description, str(len(points)), f"{steps:.0f}", f"{tokens:.0f}", f"{seconds:.0f}", *values])
    return table(titles, rows)


def _mean(values: Sequence[float | None]) -> str:
    """Return a mean for a table; some measures are taken only at the end, or only with the first seed."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "–"


def table_of_differences(group: Group, limit: float | None, measure: str) -> list[str]:
    """Return the rows of a table of paired differences at equal steps and, with a limit, at equal time."""
    rows = []
    columns = {"equal steps": None} | ({} if limit is None else {"equal time": limit})
    for arm, control in (*PAIRS, *LOSS_PAIRS):
        seeds = sorted(group.get(arm, {}).keys() & group.get(control, {}).keys())
        if not seeds:
            continue
        cells = []
        for at in columns.values():
            differences_SP = np.array(
                [
                    np.subtract(*(point_of(group[name][seed], at)["by_prompt"][measure] for name in (arm, control)))
                    for seed in seeds
                ]
            )
            low, high = interval(differences_SP)
            cells.append(f"{differences_SP.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([f"{arm} − {control}", str(len(seeds)), *cells])
    return table(["pair", "seeds", *columns], rows)


def interval(differences_SP: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return a 95 % interval of the mean of differences by seed and prompt: at each end the wider of two.

    One draws seeds and prompts anew (bootstrap), the other is Student's t over the means of the seeds: from a few seeds
    alone, the first is too narrow. Shapes: S seeds, P prompts.
    """
    numbers = np.random.default_rng(seed)
    n_seeds, n_prompts = differences_SP.shape
    counts_RS, counts_RP = (
        numbers.multinomial(size, np.full(size, 1 / size), size=_RESAMPLES) for size in (n_seeds, n_prompts)
    )
    means_R = ((counts_RS @ differences_SP) * counts_RP).sum(axis=1) / (n_seeds * n_prompts)
    low, high = np.percentile(means_R, [2.5, 97.5])
    if n_seeds > 1:
        means_S = differences_SP.mean(axis=1)
        reach = stats.t.ppf(0.975, n_seeds - 1) * means_S.std(ddof=1) / np.sqrt(n_seeds)
        low, high = min(low, means_S.mean() - reach), max(high, means_S.mean() + reach)
    return float(low), float(high)


_COLOURS = {"fixed": "tab:blue", "fresh": "tab:green", "own": "tab:red", "mixed": "tab:purple", "rising": "tab:pink"}
_MARKERS = {"forward": "o", "jsd": "s", "reverse": "^", "tv": "x"}
_PLAIN = {"sft": ":", "sft-longer": "-.", "seq-kd": "--"}
"""The lines of arms without a divergence, in grey."""


def plot(study: Study, group: Group, title: str, file: Path) -> None:
    """Draw the decisive measures against processor time: one curve per arm, the mean over its seeds.

    The colour tells what an arm learns from, the marker its loss.
    """
    n_plots = len(study.decisive)
    figure, all_axes = pyplot.subplots(n_plots, figsize=(9, 4 * n_plots), layout="constrained", squeeze=False)
    arms = [(arm, by_seed) for arm, by_seed in group.items() if arm in ARMS]
    for axes, measure in zip(all_axes[:, 0], study.decisive, strict=True):
        for arm, by_seed in arms:
            # Of two measurements before training, the later one comes after the teacher has sampled.
            curves = [
                list({point["step"]: point for point in result["points"]}.values()) for result in by_seed.values()
            ]
            seconds, values = (
                np.mean([[point[name] for point in curve] for curve in curves], axis=0)
                for name in ("cpu_seconds", measure)
            )
            samples, _, loss = arm.partition("-")
            axes.plot(
                seconds,
                values,
                _PLAIN.get(arm, "-"),
                color=_COLOURS.get(samples, "tab:gray"),
                marker=_MARKERS.get(loss, "."),
                markersize=4,
                linewidth=1,
                label=arm,
            )
        axes.set_ylabel(study.measures[measure])
    all_axes[0, 0].set_title(f"{study.name}: {title}")
    all_axes[0, 0].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    all_axes[-1, 0].set_xlabel("processor time of training, s")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]

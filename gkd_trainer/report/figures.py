"""From runs to charts: which curves there are, without how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.divergence.options import unit_of
from gkd_trainer.report.positions import PositionMeans
from gkd_trainer.report.records import Record
from gkd_trainer.report.run import Run

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: its name.
        points: its points by ascending x.
        colour: 0 to 3.
        is_dashed: whether its line is dashed.
        is_dots: whether it has no line.
        stages: the index of the run that each point is from; empty if all are from one.
    """

    name: str
    points: Points
    colour: int = 0
    is_dashed: bool = False
    is_dots: bool = False
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        key: a name for its elements, unique in a page.
        title: its subject.
        unit: of the y axis.
        x_label: of the x axis.
        series: its curves, with at least one point each.
        top: the end of the y axis if that is fixed; it begins at 0.
        is_log_x: whether the x axis is logarithmic.
        marks: positions on the x axis with a name, such as the start of a stage.
        note: what a reader should know, below the chart.
    """

    key: str
    title: str
    unit: str
    x_label: str
    series: tuple[Series, ...]
    top: float | None = None
    is_log_x: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""


_LEAST_SHARE = 16
"""How many places on the x axis each curve chooses at least, if all curves of a chart keep the same ones."""


_EVALUATION = "eval_"


@dataclass(frozen=True)
class _Curve:
    metric: str
    name: str
    colour: int
    is_dashed: bool = False
    is_dots: bool = False


@dataclass(frozen=True)
class _Plan:
    key: str
    title: str
    unit: str | None
    """None: that of the divergence."""
    curves: tuple[_Curve, ...]
    top: float | None = None
    is_summarised: bool = True
    has_sets: bool = False
    extra: Callable[[Sequence[Run]], tuple[Series, ...]] = field(default=lambda runs: ())


def _drawn_lmbda(runs: Sequence[Run]) -> tuple[Series, ...]:
    """Return λ as the options set it, at the steps of the run."""
    points: list[tuple[float, float]] = []
    stages: list[int] = []
    for stage, (start, run) in enumerate(zip(starts(runs), runs, strict=True)):
        options = run.facts.options if run.facts else {}
        first, last, steps = options.get("lmbda"), options.get("lmbda_end"), run.max_steps
        if not isinstance(first, int | float):
            continue
        if not isinstance(last, int | float) or options.get("lmbda_schedule") != "linear":
            last = first
        slope = (last - first) / max(1, (steps or 1) - 1)
        end = run.last_step
        points += [(start + 1, first), (start + end, first + slope * (end - 1))]
        stages += [stage, stage]
    return (Series("λ set", tuple(points), 3, is_dashed=True, stages=tuple(stages)),) if points else ()


PLANS = (
    _Plan(
        "divergence",
        "Divergence in training",
        None,
        (
            _Curve("divergence_on_policy", "on-policy", 0),
            _Curve("divergence_off_policy", "off-policy", 1, is_dashed=True),
        ),
    ),
    _Plan(
        "evaluation",
        "Divergence in evaluation",
        None,
        (
            _Curve("eval_on_policy_loss", "on-policy (the student's own text)", 0),
            _Curve("eval_loss", "off-policy (the data's text)", 1, is_dashed=True),
        ),
        has_sets=True,
    ),
    _Plan(
        "lmbda",
        "λ: share of on-policy samples",
        "share of samples",
        (_Curve("on_policy_share", "drawn", 0, is_dots=True),),
        top=1.0,
        extra=_drawn_lmbda,
    ),
    _Plan(
        "agreement",
        "Agreement and acceptance",
        "share of tokens",
        (
            _Curve("top_token_agreement", "same top token", 0),
            _Curve("acceptance", "acceptance Σ min(p, q)", 2, is_dashed=True),
            _Curve("eval_top_token_agreement", "same top token, evaluation", 0, is_dots=True),
            _Curve("eval_acceptance", "acceptance, evaluation", 2, is_dots=True),
        ),
        top=1.0,
        has_sets=True,
    ),
    _Plan(
        "entropy",
        "Entropy",
        "nats per token",
        (_Curve("student_entropy", "student", 0), _Curve("teacher_entropy", "teacher", 1, is_dashed=True)),
    ),
    _Plan("length", "Length of completions", "tokens", (_Curve("completion_length", "mean length", 0),)),
    _Plan(
        "truncated",
        "Completions cut off",
        "share of completions",
        (_Curve("truncated_share", "cut off by max_new_tokens", 0),),
        top=1.0,
        is_summarised=False,
    ),
    _Plan(
        "seconds",
        "Time of each log entry",
        "seconds",
        (
            _Curve("seconds_student", "student", 0),
            _Curve("seconds_teacher", "teacher", 1, is_dashed=True),
            _Curve("seconds_rollout", "rollouts", 2),
        ),
        is_summarised=False,
    ),
)
"""The charts over the optimizer steps."""


def starts(runs: Sequence[Run]) -> list[int]:
    """Return the step, on an axis that all share, at which each run begins: where the one before ended."""
    found, total = [], 0
    for run in runs:
        found.append(total)
        total += run.last_step
    return found


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts for which the runs, one after another, have values."""
    marks = tuple((start, run.name) for start, run in zip(starts(runs), runs, strict=True)) if len(runs) > 1 else ()
    drawn = []
    for plan in PLANS:
        measured = [_series(runs, curve) for curve in _curves(runs, plan)]
        series = tuple(each for each in measured if each.points)
        if series:
            series += plan.extra(runs)
            unit = plan.unit or _divergence_per_token(runs)
            drawn.append(Chart(plan.key, plan.title, unit, "optimizer step", series, plan.top, marks=marks))
    # Beside the divergences, in the first line of a wide page.
    return [*drawn[:2], *position_charts(runs), *drawn[2:], *_teachers_chart(runs, marks)]


def divergence_unit(runs: Sequence[Run]) -> str:
    """Return "nats" if the divergences of all runs are known to be in nats, else an empty string."""
    return "nats" if all(_is_in_nats(run.facts.options if run.facts else {}) for run in runs) else ""


def _is_in_nats(options: Mapping[str, Any]) -> bool:
    divergence = str(options.get("divergence"))
    return divergence in DIVERGENCES and unit_of(divergence, options.get("vocabulary_modes", ())) == "nats"


def _divergence_per_token(runs: Sequence[Run]) -> str:
    return f"{divergence_unit(runs)} per token".strip()


def _curves(runs: Sequence[Run], plan: _Plan) -> list[_Curve]:
    """Return the curves of a plan, with one more of each metric of evaluation for each named set: eval_math_loss."""
    curves = list(plan.curves)
    if not plan.has_sets:
        return curves
    kinds = {curve.metric.removeprefix(_EVALUATION): curve for curve in curves if curve.metric.startswith(_EVALUATION)}
    names = dict.fromkeys(name for run in runs for entry in run.log for name in entry if name.startswith(_EVALUATION))
    colours: dict[str, int] = {}
    for name in names:
        # The longest: eval_math_on_policy_loss also ends with _loss.
        kind = max((each for each in kinds if name.endswith(f"_{each}")), key=len, default=None)
        if kind is not None and name != f"{_EVALUATION}{kind}":
            data = name.removeprefix(_EVALUATION).removesuffix(f"_{kind}")
            # Trainer logs a time for each set: otherwise it is a metric of the user's own, such as eval_mlm_loss.
            if f"eval{f'_{data}'.removesuffix('_on_policy')}_runtime" not in names:
                continue
            # Dots of one colour look the same; lines may be dashed.
            colour = colours.setdefault(name if kinds[kind].is_dots else data, (len(colours) + 2) % 4)
            curves.append(replace(kinds[kind], metric=name, name=f"{data}: {kinds[kind].name}", colour=colour))
    return curves


def _series(runs: Sequence[Run], curve: _Curve) -> Series:
    found = [
        (stage, (start + entry["step"], entry[curve.metric]))
        for stage, (start, run) in enumerate(zip(starts(runs), runs, strict=True))
        for entry in run.log
        if curve.metric in entry
    ]
    points, stages = tuple(point for _, point in found), tuple(stage for stage, _ in found)
    return Series(curve.name, points, curve.colour, curve.is_dashed, curve.is_dots, stages)


def _teachers_chart(runs: Sequence[Run], marks: tuple[tuple[float, str], ...]) -> list[Chart]:
    prefix = "divergence_teacher_"
    names = dict.fromkeys(name for run in runs for entry in run.log for name in entry if name.startswith(prefix))
    series = tuple(
        _series(runs, _Curve(name, name.removeprefix(prefix), index % 4, is_dashed=index // 4 % 2 == 1))
        for index, name in enumerate(names)
    )
    if not series:
        return []
    title = "Divergence from each teacher"
    return [Chart("teachers", title, _divergence_per_token(runs), "optimizer step", series, marks=marks)]


def position_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the divergence by position in the completion, in the first and in the last quarter of the entries."""
    records = [record for run in runs for record in run.records if record.positions]
    if not records:
        return []
    quarter = max(1, len(records) // 4)
    parts = [("end", records[-quarter:], False)]
    if len(records) > 1:
        parts.append(("start", records[:quarter], True))
    series = tuple(
        Series(f"{name}, {part}", _mean_by_position(part_records, policy), colour, is_dashed)
        for policy, name, colour in (("on_policy", "on-policy", 0), ("off_policy", "off-policy", 1))
        for part, part_records, is_dashed in parts
    )
    series = tuple(each for each in series if each.points)
    title, label = "Divergence by position", "position in the completion, in tokens"
    note = "Solid: the last quarter of the log entries; dashed: the first. Later positions share bins."
    per_token = _divergence_per_token(runs)
    return [Chart("positions", title, per_token, label, series, is_log_x=True, note=note)] if series else []


def _mean_by_position(records: Iterable[Record], policy: str) -> Points:
    sums: dict[int, tuple[float, int]] = {}
    for record in records:
        means = record.positions.get(policy, PositionMeans((), (), ()))
        for position, divergence, tokens in zip(means.position, means.divergence, means.tokens, strict=True):
            total, count = sums.get(position, (0.0, 0))
            sums[position] = (total + divergence * tokens, count + tokens)
    return tuple((position + 1, total / count) for position, (total, count) in sorted(sums.items()) if count > 0)


def stage_table(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return the columns and rows of a table: each measure at the first log entry, and at the last of each run."""
    wanted = [
        (f"{plan.title}: {curve.name}", curve.metric)
        for plan in PLANS
        if plan.is_summarised
        for curve in _curves(runs, plan)
    ]
    columns = ["first entry", *(run.name for run in runs)] if len(runs) > 1 else ["first entry", "last entry"]
    rows = []
    for label, metric in wanted:
        found = [[entry[metric] for entry in run.log if metric in entry] for run in runs]
        first = next((values[0] for values in found if values), None)
        if first is not None:
            rows.append((label, [first, *(values[-1] if values else None for values in found)]))
    return columns, rows


def shortened(chart: Chart, max_points: int) -> Chart:
    """Return a chart whose curves have at most this many points, with the peaks and the ends of each curve.

    Unless there are many, all curves keep the same places on the x axis, so that they can be compared at each.
    """
    if len({x for each in chart.series for x, _ in each.points}) <= max_points:
        return chart
    share = max_points // len(chart.series)
    if share >= _LEAST_SHARE:
        kept = [{x for each in chart.series for x in _telling(each.points, share)}] * len(chart.series)
    else:
        kept = [_telling(each.points, max_points) for each in chart.series]
    series = tuple(_at(each, places) for each, places in zip(chart.series, kept, strict=True))
    return replace(chart, series=series)


def _at(series: Series, places: set[float]) -> Series:
    """Return a curve with only its points at these places on the x axis."""
    kept = [index for index, (x, _) in enumerate(series.points) if x in places]
    points = tuple(series.points[index] for index in kept)
    return replace(series, points=points, stages=tuple(series.stages[index] for index in kept if series.stages))


def _telling(points: Points, max_points: int) -> set[float]:
    """Return the x of at most `max_points` points: the ends, and the lowest and highest of each part."""
    if len(points) <= max_points:
        return {x for x, _ in points}
    parts = max(1, (max_points - 2) // 2)
    kept = {points[0][0], points[-1][0]}
    for part in range(parts):
        inside = points[len(points) * part // parts : len(points) * (part + 1) // parts]
        kept |= {extreme(inside, key=lambda point: point[1])[0] for extreme in (min, max)}
    return kept

"""From charts to the geometry of an SVG: axes, ticks, paths; no colours and no markup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gkd_trainer.report.figures import Chart, Series

WIDTH, HEIGHT = 400, 250
"""The size of a chart, in its own units; a page scales it."""

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 40

MAX_DOTS = 80
"""How many points a chart may have for each to be marked."""

_SHORTEST_SPAN = 1e-300
"""A range of less is drawn as if all its values were the same: floats can't divide it further."""


@dataclass(frozen=True)
class Tick:
    """A tick: its place along the axis, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class DrawnSeries:
    """A curve: the path of its line (empty for only dots), and the places of its points."""

    series: Series
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Drawing:
    """A chart's geometry. `has_dots` says that there are few enough points to mark each."""

    chart: Chart
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[DrawnSeries, ...]
    marks: tuple[Tick, ...]
    has_dots: bool


def drawn(chart: Chart) -> Drawing:
    """Return the geometry of a chart whose values are finite."""
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    x_ticks = log_ticks(max(xs)) if chart.is_log_x else nice_ticks(0.0, max(xs), 5, is_whole=True)
    low, high = min(0.0, *ys), chart.top if chart.top is not None else max(*ys, 0.0)
    y_ticks = nice_ticks(low, high if high - low > _SHORTEST_SPAN else low + 1.0, 4)
    first = 1.0 if chart.is_log_x else 0.0
    x_end = max(*xs, first + 1)
    across = _scale(first, x_end, LEFT, WIDTH - RIGHT, is_log=chart.is_log_x)
    up = _scale(min(y_ticks[0], low), max(y_ticks[-1], high), HEIGHT - BOTTOM, TOP)
    return Drawing(
        chart,
        tuple(Tick(across(x), _number(x)) for x in x_ticks if first <= x <= x_end),
        tuple(Tick(up(y), _number(y)) for y in y_ticks),
        tuple(_drawn_series(series, across, up) for series in chart.series),
        tuple(Tick(across(x), name) for x, name in chart.marks),
        has_dots=len(xs) <= MAX_DOTS,
    )


def _drawn_series(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> DrawnSeries:
    places = tuple((round(across(x), 1), round(up(y), 1)) for x, y in series.points)
    if series.is_dots:
        return DrawnSeries(series, "", places)
    # No line joins two stages: what happened between them is unknown.
    stages = series.stages or (0,) * len(places)
    moves = ["L" if index and stages[index] == stages[index - 1] else "M" for index in range(len(places))]
    path = "".join(f"{move}{x:g},{y:g}" for move, (x, y) in zip(moves, places, strict=True))
    return DrawnSeries(series, path, places)


def nice_ticks(low: float, high: float, count: int, *, is_whole: bool = False) -> list[float]:
    """Return about `count` round numbers that cover a range, each one step apart; `high` is above `low`."""
    span = high - low if high - low > _SHORTEST_SPAN else 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    if is_whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Without the last bits of the product, which would show in a label.
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(high: float) -> list[float]:
    """Return the powers of two or four from 1 to `high`."""
    exponents = range(math.floor(math.log2(max(1.0, high))) + 1)
    return [2.0**exponent for exponent in exponents if len(exponents) <= 7 or exponent % 2 == 0]


def _scale(first: float, last: float, start: float, end: float, *, is_log: bool = False) -> Callable[[float], float]:
    bend: Callable[[float], float] = math.log if is_log else lambda value: value
    span = bend(last) - bend(first) or 1.0
    return lambda value: start + (bend(value) - bend(first)) / span * (end - start)


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e4:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.4g}"


def places_by_x(drawing: Drawing) -> list[tuple[float, float, list[tuple[int, float, float]]]]:
    """Return, for each x that has points: x, its place, and (series, y, place) of each; y has six digits."""
    found: dict[float, tuple[float, list[tuple[int, float, float]]]] = {}
    for index, each in enumerate(drawing.series):
        points: Sequence[tuple[float, float]] = each.series.points
        for (x, y), (at, up) in zip(points, each.dots, strict=True):
            found.setdefault(x, (at, []))[1].append((index, float(f"{y:.6g}"), up))
    return [(x, at, values) for x, (at, values) in sorted(found.items())]

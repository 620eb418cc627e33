"""The geometry of charts."""

import itertools
import re

import pytest

from gkd_trainer.report.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    drawn,
    log_ticks,
    nice_ticks,
    places_by_x,
)
from gkd_trainer.report.figures import Chart, Series


def chart(*points, **options):
    series = tuple(Series(f"series {index}", tuple(each)) for index, each in enumerate(points))
    return Chart("key", "title", "nats", "step", series, **options)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.037), (0, 7), (-3, 2), (0, 123456), (0, 1e-9), (0, 2.5), (5, 6), (0, 99.9)]
)
def test_ticks_are_round_cover_the_range_and_are_few(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low
    assert ticks[-1] >= high * (1 - 1e-6)
    assert 2 <= len(ticks) <= 7
    steps = [second - first for first, second in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))


def test_steps_of_a_short_run_are_whole():
    assert nice_ticks(0, 3, 5, is_whole=True) == [0, 1, 2, 3]


def test_logarithmic_ticks_are_few():
    assert log_ticks(1) == [1]
    assert log_ticks(8) == [1, 2, 4, 8]
    assert len(log_ticks(16384)) <= 8


@pytest.mark.parametrize(
    "given",
    [
        chart([(1, 0.5)]),
        chart([(0, 0.0)]),
        chart([(5, 0.0), (10, 0.0)]),
        chart([(1, 1e-12), (2, 1e12)]),
        chart([(1, -4.0), (2, -2.0)], [(3, 7.0)]),
        chart([(1, 0.2), (400, 1.0)], top=1.0),
        chart([(1, 0.5)], is_log_x=True),
        chart([(1, 0.5), (16384, 2.0)], is_log_x=True),
    ],
    ids=lambda chart: str(chart.series[0].points),
)
def test_every_point_and_tick_is_inside_the_frame(given):
    drawing = drawn(given)
    for series in drawing.series:
        for x, y in series.dots:
            assert LEFT <= x <= WIDTH - RIGHT
            assert TOP <= y <= HEIGHT - BOTTOM
        assert len(re.findall(r"[\d.]+,[\d.]+", series.path)) == len(series.dots)
    assert all(LEFT <= tick.at <= WIDTH - RIGHT for tick in drawing.x_ticks)
    assert all(TOP - 0.01 <= tick.at <= HEIGHT - BOTTOM + 0.01 for tick in drawing.y_ticks)


def test_larger_values_are_higher_and_later_ones_further_right():
    [series] = drawn(chart([(1, 1.0), (2, 3.0), (4, 2.0)])).series
    (x1, y1), (x2, y2), (x3, y3) = series.dots
    assert x1 < x2 < x3
    assert y2 < y3 < y1


def test_a_fixed_axis_ends_where_it_should():
    drawing = drawn(chart([(1, 0.2)], top=1.0))
    assert [tick.label for tick in drawing.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]


def test_values_are_found_by_x_for_the_tooltip():
    drawing = drawn(chart([(1, 1.0), (2, 3.0)], [(2, 0.5)]))
    (x1, _, first), (x2, _, second) = places_by_x(drawing)
    assert (x1, x2) == (1, 2)
    assert [(index, y) for index, y, _ in first] == [(0, 1.0)]
    assert [(index, y) for index, y, _ in second] == [(0, 3.0), (1, 0.5)]


def test_only_dots_have_no_line():
    given = Chart("key", "title", "nats", "step", (Series("a", ((1, 1.0), (2, 2.0)), is_dots=True),))
    assert drawn(given).series[0].path == ""


def test_no_line_joins_two_stages():
    points = ((0, 1.0), (40, 1.0), (40, 3.0), (80, 2.0))  # each stage from its baseline on
    series = Series("a", points, stages=(0, 0, 1, 1))
    given = Chart("key", "title", "nats", "step", (series,), marks=((0, "first"), (40, "second")))
    assert re.sub(r"[\d.,]", "", drawn(given).series[0].path) == "MLML"


@pytest.mark.parametrize("high", [1e-13, 3e-13, 7e-9, 5e4, 2e9, 1e300])
def test_every_tick_has_a_label_of_its_own_that_says_its_value(high):
    drawing = drawn(chart([(1, high), (2, high / 3)]))
    labels = [tick.label for tick in drawing.y_ticks]
    ticks = nice_ticks(0.0, high, 4)
    assert len(set(labels)) == len(labels) == len(ticks) >= 3
    factors = {"k": 1e3, "M": 1e6}
    shown = [float(label.rstrip("kM")) * factors.get(label[-1], 1) for label in labels]
    assert shown == pytest.approx(ticks, rel=0.01)


@pytest.mark.parametrize("high", [5e-324, 1e-323, 1e-310])
def test_values_too_small_to_divide_are_drawn_as_zero(high):
    drawing = drawn(chart([(1, high), (2, -high)]))
    assert {tick.label for tick in drawing.y_ticks} >= {"0", "1"}
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in drawing.series[0].dots)

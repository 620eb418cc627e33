"""Tables and intervals from results: what is compared with what, and when."""

from argparse import Namespace

import numpy as np
import pytest

from experiments.report import common_time, grouped, interval, point_of, table_of_ends, write_report

STUDY = Namespace(name="toy", decisive=("success",), measures={"success": "success"}, kinds={})


def result(arm, seed, curve, by_prompt, steps=20):
    """A run measured at (step, seconds, success)."""
    points = [
        {
            "step": step,
            "tokens": 8 * step,
            "seconds": seconds,
            "cpu_seconds": seconds,
            "success": value,
            "by_prompt": {"success": by_prompt},
        }
        for step, seconds, value in curve
    ]
    return {"arm": arm, "seed": seed, "steps": steps, "factors": {"width": 8}, "points": points}


RESULTS = [
    result("fixed-forward", 0, [(0, 0.0, 0.1), (10, 5.0, 0.4), (20, 10.0, 0.5)], [1, 0, 0, 0]),
    result("fixed-forward", 1, [(0, 0.0, 0.1), (10, 6.0, 0.4), (20, 12.0, 0.7)], [1, 1, 0, 0]),
    result("own-forward", 0, [(0, 0.0, 0.1), (10, 10.0, 0.6), (20, 20.0, 0.9)], [1, 1, 1, 0]),
    result("own-forward", 1, [(0, 0.0, 0.1), (10, 30.0, 0.6), (20, 60.0, 0.8)], [1, 1, 1, 1]),
]


def test_arms_are_compared_at_the_time_that_supervised_training_takes():
    [group] = grouped(RESULTS).values()
    assert common_time(group) == 11.0  # between those of two seeds
    assert point_of(group["own-forward"][0], 15.0)["success"] == pytest.approx(0.75)  # halfway between two
    assert point_of(group["own-forward"][1], 15.0)["success"] == pytest.approx(0.35)
    assert point_of(group["own-forward"][1], 15.0)["step"] == 5
    assert point_of(group["own-forward"][1])["success"] == 0.8
    assert point_of(group["fixed-forward"][0], 15.0)["success"] == 0.5  # has ended by then


def test_a_measure_that_one_of_two_points_lacks_is_not_interpolated():
    start, half, end = ({"step": step, "cpu_seconds": step, "acceptance": step / 2} for step in (0, 1, 2))
    run = {"points": [start | {"greedy_4": 2.0}, half, end | {"greedy_4": 3.0}]}
    for limit, step in ((0.5, 0.5), (1.5, 1.5)):
        assert point_of(run, limit) == {"step": step, "cpu_seconds": step, "acceptance": step / 2}
    assert point_of(run, 2.0)["greedy_4"] == 3.0


def test_a_measure_that_only_some_seeds_have_is_their_mean_in_a_table():
    study = Namespace(measures={"success": "success", "greedy_4": "greedy", "sampled_4": "sampled"})
    points = [{"step": 1, "tokens": 9, "cpu_seconds": 1.0, "success": seed / 2} for seed in range(3)]
    points[0]["greedy_4"] = 2.5
    group = {"sft": {seed: {"points": [point]} for seed, point in enumerate(points)}}
    assert table_of_ends(study, group)[2].endswith("| 3 | 1 | 9 | 1 | 0.500 | 2.500 | – |")


def test_results_of_other_numbers_of_steps_are_not_mixed_in():
    short = [result(arm, 0, [(0, 0.0, 0.1), (5, 2.0, 0.3)], [1, 0, 0, 0], steps=5) for arm in ("sft", "own-forward")]
    groups = grouped([*RESULTS, *short])
    assert [dict(factors)["steps"] for factors in groups] == [20, 5]
    assert [sorted(group["own-forward"]) for group in groups.values()] == [[0, 1], [0]]


def test_the_teacher_and_what_all_arms_start_from_come_first():
    teacher = result("teacher", 0, [(0, 0.0, 0.99)], [1, 1, 1, 1])
    [group] = grouped([*RESULTS, teacher]).values()
    assert list(group) == ["teacher", "start", "fixed-forward", "own-forward"]
    assert {point_of(by_seed)["success"] for by_seed in group["start"].values()} == {0.1}


def test_a_report_has_both_tables_and_the_paired_difference(tmp_path):
    text = write_report(STUDY, RESULTS, tmp_path).read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    ends = [row for row in rows if row[0] == "own-forward"]
    assert [(row[3], row[4], row[6]) for row in ends] == [("20", "160", "0.850"), ("7", "59", "0.457")]
    [difference] = [row for row in rows if row[0] == "own-forward − fixed-forward"]
    assert difference[1] == "2"
    assert difference[2].startswith("+0.500 [")
    assert (tmp_path / "toy-width8-steps20.png").stat().st_size > 1000


def test_without_the_arm_that_sets_it_nothing_is_compared_at_equal_time(tmp_path):
    teacher = result("teacher", 0, [(0, 0.0, 0.99)], [1, 1, 1, 1])
    for results in ([teacher], [teacher, RESULTS[2]]):  # as far as an interrupted run may have come
        text = write_report(STUDY, results, tmp_path).read_text()
        assert "| teacher |" in text
        assert "processor time" not in text
        assert "equal time" not in text


def test_curves_of_which_some_have_two_measurements_before_training_are_drawn(tmp_path):
    curve = [(0, 0.0, 0.1), (10, 5.0, 0.4)]
    results = [result("seq-kd", 0, curve, [1]), result("seq-kd", 1, [curve[0], (0, 3.0, 0.1), (10, 8.0, 0.4)], [1])]
    write_report(STUDY, results, tmp_path)
    assert (tmp_path / "toy-width8-steps20.png").stat().st_size > 1000


def test_two_lines_for_one_run_are_refused():
    with pytest.raises(ValueError, match=r"two results of own-forward, seed 1, .*: delete one"):
        grouped([*RESULTS, RESULTS[-1]])


def test_a_measure_is_also_shown_by_the_kind_of_prompt(tmp_path):
    results = [result("sft", seed, [(0, 0.0, 0.0), (20, 1.0, 0.5)], [1.0, 0.0, float(seed)]) for seed in range(2)]
    study = Namespace(**vars(STUDY) | {"kinds": {"success": ["near", "far", "far"]}})
    text = write_report(study, results, tmp_path).read_text()
    assert "| arm | far (2) | near (1) |" in text
    assert "| sft | 0.250 | 1.000 |" in text


def test_an_interval_holds_the_mean_and_narrows_with_data():
    numbers = np.random.default_rng(0)
    few, many = (numbers.normal(0.2, 1.0, size=size) for size in ((3, 20), (30, 200)))
    for differences_SP in (few, many):
        low, high = interval(differences_SP)
        assert low < differences_SP.mean() < high
    assert np.subtract(*interval(many)[::-1]) < np.subtract(*interval(few)[::-1]) / 3
    assert interval(np.full((3, 4), 0.25)) == pytest.approx((0.25, 0.25))


def test_prompts_that_differ_widen_the_interval_of_equal_seeds():
    low, high = interval(np.tile([0.0, 1.0], (3, 50)))
    assert low < 0.42
    assert high > 0.58


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_an_interval_from_few_seeds_misses_the_mean_about_once_in_twenty(n_seeds):
    numbers = np.random.default_rng(1)
    draws = [numbers.normal(0.0, 1.0, size=(n_seeds, 1)) + np.zeros((n_seeds, 8)) for _ in range(300)]
    misses = sum(not low <= 0 <= high for low, high in map(interval, draws))
    assert 0 < misses <= 24  # 15 expected; the bootstrap by itself misses it 39 times or more

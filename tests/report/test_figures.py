"""Which curves a run has."""

import pytest

from gkd_trainer.report.figures import charts, shortened, stage_table, starts
from gkd_trainer.report.positions import PositionMeans
from gkd_trainer.report.records import Record, RunFacts
from gkd_trainer.report.run import Run


def run(name="run", *, steps=(10, 20, 30, 40), facts=None, records=(), **metrics):
    log = tuple({"step": step, **{key: value(step) for key, value in metrics.items()}} for step in steps)
    return Run(name, facts, 40, log, tuple(records), ())


def facts(**options):
    return RunFacts("student", "teacher", 40, options)


def chart_of(runs, key):
    return next(chart for chart in charts(runs) if chart.key == key)


def test_on_and_off_policy_divergences_are_two_curves_of_one_chart():
    chart = chart_of(
        [run(divergence_on_policy=lambda step: 1 / step, divergence_off_policy=lambda step: 2 / step)], "divergence"
    )
    assert [series.name for series in chart.series] == ["on-policy", "off-policy"]
    assert chart.series[1].points == ((10, 0.2), (20, 0.1), (30, 2 / 30), (40, 0.05))
    assert chart.series[0].colour != chart.series[1].colour
    assert chart.series[0].is_dashed != chart.series[1].is_dashed  # not only by colour


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"divergence": "jsd"}, "nats per token"),
        ({"divergence": "adaptive_kl", "vocabulary_modes": ["matched"]}, "nats per token"),
        ({"divergence": "total_variation"}, "per token"),
        ({"divergence": "alpha_beta"}, "per token"),
        ({"divergence": "jsd", "vocabulary_modes": ["matched", "uld"]}, "per token"),
        ({"divergence": "jsd", "vocabulary_modes": ["gold"]}, "per token"),
        ({"divergence": ["jsd"]}, "per token"),
        (None, "per token"),
    ],
    ids=str,
)
def test_a_divergence_is_in_nats_only_if_its_run_says_so(options, unit):
    records = [Record(1, positions={"on_policy": means(1.0)})]
    names = ("divergence_on_policy", "eval_loss", "divergence_teacher_math", "student_entropy")
    metrics = dict.fromkeys(names, lambda step: 1.0)
    own = run(facts=None if options is None else facts(**options), records=records, **metrics)
    in_nats = run(facts=facts(divergence="jsd"), **metrics)
    for runs in ([own], [in_nats, own]):
        units = {chart.key: chart.unit for chart in charts(runs)}
        assert units.pop("entropy") == "nats per token"
        assert units == dict.fromkeys(("divergence", "evaluation", "positions", "teachers"), unit)


def test_a_chart_without_values_is_left_out():
    assert [chart.key for chart in charts([run(student_entropy=lambda step: 1.0)])] == ["entropy"]
    assert charts([run(loss=lambda step: 1.0)]) == []


def test_the_lambda_drawn_is_beside_the_one_set():
    options = facts(lmbda=0.0, lmbda_end=1.0, lmbda_schedule="linear")
    chart = chart_of([run(facts=options, on_policy_share=lambda step: step / 40)], "lmbda")
    drawn, chosen = chart.series
    assert drawn.points[-1] == (40, 1.0)
    assert chosen.points[0] == (1, 0.0)
    assert chosen.points[1] == (40, pytest.approx(1.0))
    constant = chart_of([run(facts=facts(lmbda=0.25), on_policy_share=lambda step: 0.3)], "lmbda").series[1]
    assert constant.points == ((1, 0.25), (40, 0.25))


def test_a_killed_runs_lambda_ends_where_the_run_did():
    options = facts(lmbda=0.0, lmbda_end=1.0, lmbda_schedule="linear")
    chart = chart_of([run(steps=(10, 20), facts=options, on_policy_share=lambda step: 0.5)], "lmbda")
    assert chart.series[1].points[1] == (20, pytest.approx(19 / 39))


def test_several_runs_are_one_after_another_with_marks():
    runs = [run(name, divergence_on_policy=lambda step: 1.0) for name in ("first", "second", "third")]
    assert starts(runs) == [0, 40, 80]
    chart = chart_of(runs, "divergence")
    assert chart.marks == ((0, "first"), (40, "second"), (80, "third"))
    assert [x for x, _ in chart.series[0].points] == list(range(10, 121, 10))
    assert chart_of(runs[:1], "divergence").marks == ()


def test_an_evaluation_before_training_belongs_to_the_stage_that_it_begins():
    options = facts(lmbda=0.5)
    runs = [
        run(name, steps=(0, 20, 40), facts=options, eval_loss=lambda step: 1.0, on_policy_share=lambda step: 0.5)
        for name in ("first", "second")
    ]
    [series] = chart_of(runs, "evaluation").series
    assert [x for x, _ in series.points] == [0, 20, 40, 40, 60, 80]
    assert series.stages == (0, 0, 0, 1, 1, 1)
    assert chart_of(runs, "lmbda").series[1].stages == (0, 0, 1, 1)


def test_a_shortened_curve_keeps_its_stages():
    runs = [run(name, steps=range(1001), divergence_on_policy=lambda step: step) for name in ("first", "second")]
    [series] = shortened(chart_of(runs, "divergence"), 100).series
    assert len(series.points) <= 102
    assert list(zip([x for x, _ in series.points], series.stages, strict=True))[-1] == (2000, 1)
    assert [y for (x, y), stage in zip(series.points, series.stages, strict=True) if x == 1000] == [1000, 0]
    assert [stage for (x, _), stage in zip(series.points, series.stages, strict=True) if x == 1000] == [0, 1]


def means(*divergences, tokens=1):
    return PositionMeans(tuple(range(len(divergences))), divergences, (tokens,) * len(divergences))


def test_the_divergence_by_position_is_weighted_by_tokens():
    records = [
        Record(1, positions={"on_policy": means(9.0)}),
        *(Record(step, positions={"on_policy": means(8.0)}) for step in range(2, 7)),
        Record(7, positions={"on_policy": means(1.0, 4.0)}),
        Record(8, positions={"on_policy": means(3.0, tokens=3), "off_policy": means(5.0)}),
    ]
    chart = chart_of([run(records=records)], "positions")
    by_name = {series.name: series.points for series in chart.series}
    assert by_name == {
        "on-policy, end": ((1, 2.5), (2, 4.0)),
        "on-policy, start": ((1, 8.5),),
        "off-policy, end": ((1, 5.0),),
    }


def test_each_of_several_teachers_has_a_curve():
    chart = chart_of(
        [run(divergence_teacher_math=lambda step: 1.0, divergence_teacher_code=lambda step: 2.0)], "teachers"
    )
    assert [series.name for series in chart.series] == ["math", "code"]


def test_each_of_several_evaluation_sets_has_its_curves():
    values = {
        "eval_math_loss": 0.5,
        "eval_code_loss": 0.7,
        "eval_math_on_policy_loss": 0.3,
        "eval_math_acceptance": 0.9,
        "eval_math_on_policy_acceptance": 0.8,
        "eval_math_runtime": 1.0,
        "eval_code_runtime": 1.0,
    }
    runs = [run(**{name: lambda step, value=value: value for name, value in values.items()})]
    chart = chart_of(runs, "evaluation")
    assert {series.name: series.points[0][1] for series in chart.series} == {
        "math: off-policy (the data's text)": 0.5,
        "code: off-policy (the data's text)": 0.7,
        "math: on-policy (the student's own text)": 0.3,
    }
    of_math, of_code, own_math = chart.series
    assert of_math.colour == own_math.colour != of_code.colour
    assert of_math.is_dashed != own_math.is_dashed
    assert [series.name for series in chart_of(runs, "agreement").series] == [
        "math: acceptance, evaluation",
        "math_on_policy: acceptance, evaluation",
    ]
    assert ("Divergence in evaluation: code: off-policy (the data's text)", [0.7, 0.7]) in stage_table(runs)[1]


def test_a_users_own_metric_of_an_evaluation_is_no_evaluation_set():
    names = ("loss", "runtime", "mlm_loss", "speech_acceptance", "on_policy_acceptance", "math_mlm_loss")
    runs = [run(**{f"eval_{name}": lambda step: 400.0 for name in names})]
    assert [series.name for series in chart_of(runs, "evaluation").series] == ["off-policy (the data's text)"]
    assert [series.name for series in chart_of(runs, "agreement").series] == ["on_policy: acceptance, evaluation"]


def test_the_table_has_the_first_entry_and_the_last_of_each_stage():
    runs = [
        run("a", divergence_on_policy=lambda step: step / 10),
        run("b", divergence_on_policy=lambda step: step, student_entropy=lambda step: -step),
    ]
    columns, rows = stage_table(runs)
    assert columns == ["first entry", "a", "b"]
    assert rows == [
        ("Divergence in training: on-policy", [1.0, 4.0, 40]),
        ("Entropy: student", [-10, None, -40]),
    ]


@pytest.mark.parametrize("spike", [1, 501, 50_001, 99_999])
@pytest.mark.parametrize("height", [1001.0, -1001.0])
def test_a_long_curve_keeps_its_ends_and_every_spike(spike, height):
    values = {spike: height}
    chart = chart_of(
        [
            run(
                steps=range(1, 100_001),
                divergence_on_policy=lambda step: values.get(step, 1 / step),
                divergence_off_policy=lambda step: 1.0,
            )
        ],
        "divergence",
    )
    on_policy, off_policy = (each.points for each in shortened(chart, 400).series)
    assert (spike, height) in on_policy
    assert [on_policy[0][0], on_policy[-1][0]] == [1, 100_000]
    assert 150 < len(on_policy) <= 400
    assert [x for x, _ in on_policy] == [x for x, _ in off_policy] == sorted({x for x, _ in on_policy})


def test_a_sparse_curve_beside_a_long_one_stays_whole():
    log = tuple(
        {"step": step, "acceptance": 0.5, **({"eval_acceptance": step} if step % 100 == 0 else {})}
        for step in range(1, 5001)
    )
    chart = shortened(chart_of([Run("run", None, 5000, log, (), ())], "agreement"), 400)
    dense, sparse = (each.points for each in chart.series)
    assert [y for _, y in sparse] == list(range(100, 5001, 100))
    assert len(dense) <= 400


def test_a_short_curve_stays_as_it_is():
    chart = chart_of([run(steps=range(1, 301), divergence_on_policy=lambda step: float(step))], "divergence")
    assert shortened(chart, 300) == chart

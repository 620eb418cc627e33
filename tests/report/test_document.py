"""The report of one or several runs."""

import math
import random
import re
from dataclasses import replace

import pytest

from gkd_trainer.report.document import MAX_MAP_BYTES, run_page
from gkd_trainer.report.figures import PLANS
from gkd_trainer.report.run import Run, read_run
from tests.report.samples import FACTS, NASTY, record, token_map, write_records, write_state
from tests.report.test_page import data_of


def reported(folder, records, name="run"):
    (folder / name).mkdir()
    write_records(folder / name, records)
    return read_run(folder / name)


def test_a_report_has_curves_completions_and_the_change(tmp_path):
    page = run_page([reported(tmp_path, [record(step) for step in (10, 20, 40)])])
    data = data_of(page)
    assert [entry["step"] for entry in data["entries"]] == [10, 20, 40]
    assert set(data["charts"]) == {"divergence", "positions", "lmbda"}
    for key in data["charts"]:
        assert f'id="chart-{key}"' in page
    assert "From start to end" in page
    captions = [each["caption"] for each in data["entries"][0]["maps"]]
    assert captions == ["On-policy: the student wrote it, step 10", "Off-policy, step 10"]


def test_several_runs_are_stages(tmp_path):
    runs = [reported(tmp_path, [record(step) for step in (20, 40)], name) for name in ("off", "on")]
    page = run_page(runs)
    assert '<h2 id="stages">Stages</h2>' in page
    assert "off → on" in page
    assert [entry["step"] for entry in data_of(page)["entries"]] == [20, 40, 60, 80]


def test_a_page_has_the_unit_of_its_runs_divergence(tmp_path):
    run = reported(tmp_path, [record(1)])
    assert data_of(run_page([run]))["unit"] == "nats"
    other = replace(run, facts=replace(FACTS, options={"divergence": "total_variation"}))
    assert data_of(run_page([run, other]))["unit"] == ""
    assert "nats" not in re.sub(r"<script>.*?</script>", "", run_page([other]), flags=re.DOTALL)


def test_a_log_alone_is_enough(tmp_path):
    write_state(tmp_path / "trainer_state.json", (10, 40), divergence_off_policy=0.5)
    page = run_page([read_run(tmp_path)])
    assert data_of(page)["entries"] == []
    assert "report_samples=4" in page
    assert 'id="maps"' not in page


def test_a_log_without_our_metrics_is_a_page_without_curves(tmp_path):
    write_state(tmp_path / "trainer_state.json", (10, 40))
    assert data_of(run_page([read_run(tmp_path)]))["charts"] == {}


def test_a_page_stays_below_a_megabyte_and_spans_the_run(tmp_path):
    long = token_map(("<<<<&",) * 500)  # escapes take more room than the text
    page = run_page([reported(tmp_path, [record(step, samples=(long, long)) for step in range(1, 41)])])
    assert len(page.encode()) < 1_000_000
    steps = [entry["step"] for entry in data_of(page)["entries"]]
    assert (steps[0], steps[-1]) == (1, 40)
    assert len(steps) >= 2


def test_of_one_entry_that_is_too_large_some_maps_are_shown(tmp_path):
    long = token_map((" token",) * 500)
    size = MAX_MAP_BYTES / len(str(long.to_json()))
    page = run_page([reported(tmp_path, [record(1, samples=(long,) * math.ceil(4 * size))])])
    assert len(page.encode()) < 1_000_000
    [entry] = data_of(page)["entries"]
    assert 1 <= len(entry["maps"]) < math.ceil(4 * size)


def test_a_runs_name_and_facts_are_escaped(tmp_path):
    page = run_page([reported(tmp_path, [record(1, samples=(token_map(NASTY),))], name="<script>alert(1)<")])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page


def test_a_long_run_is_a_small_page(tmp_path):
    page = run_page([reported(tmp_path, [record(step, samples=()) for step in range(1, 1001)])])
    assert len(page.encode()) < 500_000


@pytest.mark.parametrize("teachers", [4, 40, 200])
def test_the_curves_of_many_metrics_leave_room_for_completions(teachers):
    names = [f"divergence_teacher_{index}" for index in range(teachers)]
    names += [curve.metric for plan in PLANS for curve in plan.curves]
    draw = random.Random(0).random
    log = tuple({"step": step, **{name: draw() for name in names}} for step in range(1, 2001))
    records = [record(step, samples=(token_map(("<<<<&",) * 500),) * 2) for step in range(1, 41)]
    run = Run("run", FACTS, 2000, log, tuple(records), ())
    page = run_page([run])
    assert len(page.encode()) < 1_000_000
    points = data_of(page)["charts"]["teachers"]
    assert len(points) > 20
    assert teachers > 4 or all(len(values) == teachers for _, _, values in points)

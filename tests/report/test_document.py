"""The report of one or several runs."""

import random
import re
from dataclasses import replace

import pytest

from gkd_trainer.report.document import _json, run_page
from gkd_trainer.report.figures import PLANS
from gkd_trainer.report.page import map_values
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
    assert captions == ["On-policy (written by the student), step 10", "Off-policy, step 10"]


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


@pytest.mark.parametrize(
    ("modes", "shown"),
    [
        ([], "JSD, β 0.5"),
        (["matched"], "JSD, β 0.5 over matched tokens"),
        (["next_byte"], "JSD, β 0.5 over the next byte"),
        (["uld"], "ULD"),
        (["gold"], "JSD, β 0.5 and ULD (GOLD)"),
        (["of a later version"], "JSD, β 0.5"),
    ],
)
def test_the_top_of_a_page_says_how_another_vocabulary_was_compared(tmp_path, modes, shown):
    facts = replace(FACTS, options={**FACTS.options, "vocabulary_modes": modes})
    page = run_page([replace(reported(tmp_path, [record(1)]), facts=facts)])
    assert f"<dt>divergence</dt><dd>{shown}</dd>" in page


def test_a_log_alone_is_enough(tmp_path):
    write_state(tmp_path / "trainer_state.json", (10, 40), divergence_off_policy=0.5)
    page = run_page([read_run(tmp_path)])
    assert data_of(page)["entries"] == []
    assert "report_samples=4" in page
    assert 'id="maps"' not in page


def test_a_log_without_our_metrics_is_a_page_without_curves(tmp_path):
    write_state(tmp_path / "trainer_state.json", (10, 40))
    assert data_of(run_page([read_run(tmp_path)]))["charts"] == {}


NOTE = "would make this page too large"


def test_long_completions_stay_small_enough_to_mail_and_span_the_run(tmp_path):
    long = token_map(("<<<<&",) * 512)  # escapes take more room than the text
    page = run_page([reported(tmp_path, [record(step, samples=(long,) * 4) for step in range(1, 21)])])
    assert 3_000_000 < len(page.encode()) < 5_000_000
    entries = data_of(page)["entries"]
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    n_maps = len(entries[0]["maps"])
    assert 1 <= n_maps < 4
    assert f"Completions are shown, at most {n_maps} of 4 per entry: all of them {NOTE}" in page


@pytest.mark.parametrize(("room", "n_entries", "n_maps"), [(22, 22, 1), (40, 20, 2), (81, 27, 3)])
def test_entries_are_left_out_only_once_there_are_many(tmp_path, monkeypatch, room, n_entries, n_maps):
    size = len(_json(map_values(token_map(), "On-policy (written by the student), step 1")))
    monkeypatch.setattr("gkd_trainer.report.document.MAX_MAP_BYTES", (room * size) + size // 2)
    page = run_page([reported(tmp_path, [record(step, samples=(token_map(),) * 3) for step in range(1, 31)])])
    entries = data_of(page)["entries"]
    assert (len(entries), {len(entry["maps"]) for entry in entries}) == (n_entries, {n_maps})
    assert (entries[0]["step"], entries[-1]["step"]) == (1, 30)
    assert f"Completions of {n_entries} of 30 log entries are shown" in page


def test_completions_that_all_fit_need_no_note(tmp_path):
    assert NOTE not in run_page([reported(tmp_path, [record(step) for step in (10, 20, 40)])])


def test_of_two_entries_both_are_shown_with_fewer_completions(tmp_path, monkeypatch):
    monkeypatch.setattr("gkd_trainer.report.document.MAX_MAP_BYTES", 20_000)
    long = token_map((" token",) * 50)
    page = run_page([reported(tmp_path, [record(step, samples=(long,) * 4) for step in (1, 2)])])
    assert [entry["step"] for entry in data_of(page)["entries"]] == [1, 2]
    assert "Completions are shown, at most" in page


def test_of_one_entry_that_is_too_large_some_maps_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("gkd_trainer.report.document.MAX_MAP_BYTES", 100_000)
    page = run_page([reported(tmp_path, [record(1, samples=(token_map((" token",) * 100),) * 20)])])
    [entry] = data_of(page)["entries"]
    assert 1 <= len(entry["maps"]) < 20
    assert f"at most {len(entry['maps'])} of 20 per entry" in page


def test_of_completions_that_are_each_too_large_none_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("gkd_trainer.report.document.MAX_MAP_BYTES", 10)
    page = run_page([reported(tmp_path, [record(step) for step in (10, 20)])])
    assert data_of(page)["entries"] == []
    assert "Completions of 0 of 2 log entries are shown: all" in page


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
    assert len(page.encode()) < 5_000_000
    points = data_of(page)["charts"]["teachers"]
    assert len(points) > 20
    assert teachers > 4 or all(len(values) == teachers for _, _, values in points)

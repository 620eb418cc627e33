"""What is read from the output folders of runs, complete or not."""

import dataclasses
import json
import os

import pytest

from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.document import run_page
from gkd_trainer.report.records import Record
from gkd_trainer.report.run import read_run
from tests.report.samples import FACTS, record, write_records, write_state


def test_a_finished_run_has_its_log_once(tmp_path):
    write_records(tmp_path, [record(step) for step in (10, 20, 30, 40)])
    write_state(tmp_path / "trainer_state.json", (10, 20, 30, 40), epoch=1.0)
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.log] == [10, 20, 30, 40]
    assert run.log[0]["epoch"] == 1.0  # the state's entry, which has more
    assert (run.facts, run.max_steps, run.last_step, run.notes) == (FACTS, 40, 40, ())
    assert run.name == tmp_path.name


def test_a_run_killed_before_any_checkpoint_has_what_it_recorded(tmp_path):
    write_records(tmp_path, [record(1), record(2)])
    run = read_run(tmp_path)
    assert [entry["loss"] for entry in run.log] == [1.0, 0.5]
    assert run.notes == ("The last known step is 2 of 40: the run is not finished.",)


def test_a_run_killed_after_a_checkpoint_continues_with_what_it_recorded(tmp_path):
    write_state(tmp_path / "checkpoint-2" / "trainer_state.json", (1, 2))
    write_records(tmp_path, [record(1), record(2), record(3)])
    assert [entry["step"] for entry in read_run(tmp_path).log] == [1, 2, 3]


def test_the_last_checkpoints_state_is_read(tmp_path):
    for step in (10, 9, 2):
        state = write_state(tmp_path / f"checkpoint-{step}" / "trainer_state.json", range(1, step + 1))
        os.utime(state, (step, step))
    assert read_run(tmp_path).last_step == 10


def test_a_run_that_kept_nothing_says_how_to(tmp_path):
    write_state(tmp_path / "trainer_state.json", (40,))
    run = read_run(tmp_path)
    assert (run.facts, run.records) == (None, ())
    assert run.notes == ("This run kept no completions: report_samples=4, for example, keeps four per log entry.",)


def test_broken_files_are_named_and_left_out(tmp_path):
    state = write_state(tmp_path / "trainer_state.json", (1, 2))
    state.write_text(state.read_text()[:-30])
    path = write_records(tmp_path, [record(1), record(2)])
    path.write_text(path.read_text()[:-30])
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.log] == [1]
    assert "trainer_state.json could not be read, and is left out" in run.notes[1]
    assert run.notes[2] == "1 line of _report.jsonl could not be read and is left out."


def test_a_broken_state_gives_way_to_an_older_one(tmp_path):
    write_state(tmp_path / "checkpoint-1" / "trainer_state.json", (1,))
    (tmp_path / "trainer_state.json").write_text("[]")
    run = read_run(tmp_path)
    assert run.last_step == 1
    assert any("no log_history" in note for note in run.notes)


@pytest.mark.parametrize("newer", ["state", "records"])
def test_files_of_different_runs_are_not_mixed(tmp_path, newer):
    state = write_state(tmp_path / "trainer_state.json", (1, 2, 3))
    path = write_records(tmp_path, [record(1, loss=7.0), record(2, loss=7.0)])
    os.utime(state, (2, 2) if newer == "state" else (1, 1))
    os.utime(path, (1, 1) if newer == "state" else (2, 2))
    run = read_run(tmp_path)
    assert [entry["loss"] for entry in run.log] == ([1.0, 0.5, 1 / 3] if newer == "state" else [7.0, 7.0])
    older = "_report.jsonl" if newer == "state" else "trainer_state.json"
    assert f"{older} is from an earlier run, and is left out." in run.notes


def test_a_run_whose_last_steps_were_not_logged_is_finished(tmp_path):
    path = write_state(tmp_path / "checkpoint-13" / "trainer_state.json", (5, 10), max_steps=13)
    path.write_text(path.read_text().replace('"global_step": 10', '"global_step": 13'))
    run = read_run(tmp_path)
    assert run.last_step == 13
    assert not any("not finished" in note for note in run.notes)


@pytest.mark.parametrize("summary", [{}, {"train_runtime": 1.0}])
def test_a_run_that_stopped_early_is_finished(tmp_path, summary):
    write_records(tmp_path, [record(1), record(2), Record(2, {"epoch": 1.0, **summary})])
    assert any("not finished" in note for note in read_run(tmp_path).notes) == (not summary)


def test_an_evaluation_after_training_is_in_the_log(tmp_path):
    write_state(tmp_path / "checkpoint-2" / "trainer_state.json", (1, 2), max_steps=2)
    late = [Record(2, {"eval_math_loss": 0.5, "epoch": 1.0}), Record(2, {"eval_code_loss": 0.7, "epoch": 1.0})]
    write_records(tmp_path, [record(1), record(2), *late])
    log = read_run(tmp_path).log
    assert [entry["step"] for entry in log] == [1, 2, 2, 2]
    assert [entry.get("eval_math_loss", entry.get("eval_code_loss")) for entry in log[2:]] == [0.5, 0.7]


def test_the_log_is_in_the_order_of_steps(tmp_path):
    write_records(tmp_path, [record(1), record(2), Record(0, {"eval_loss": 0.5})])
    assert [entry["step"] for entry in read_run(tmp_path).log] == [0, 1, 2]


def test_an_old_checkpoint_that_logged_other_steps_is_of_another_run(tmp_path):
    state = write_state(tmp_path / "checkpoint-100" / "trainer_state.json", range(10, 101, 10), loss=9.0)
    os.utime(state, (1, 1))
    write_records(tmp_path, [record(step, loss=1.0) for step in range(7, 64, 7)])
    run = read_run(tmp_path)
    assert {entry["loss"] for entry in run.log} == {1.0}
    assert any("checkpoint-100/trainer_state.json is from an earlier run" in note for note in run.notes)


@pytest.mark.parametrize(("started", "losses"), [(1000.0, [1.0]), (10.0, [9.0, 1.0]), (None, [9.0, 1.0])])
def test_a_checkpoint_older_than_the_run_is_of_another_run(tmp_path, started, losses):
    state = write_state(tmp_path / "checkpoint-5" / "trainer_state.json", (5,), loss=9.0)
    os.utime(state, (500, 500))
    write_records(tmp_path, [record(50, loss=1.0)], dataclasses.replace(FACTS, started=started))
    assert [entry["loss"] for entry in read_run(tmp_path).log] == losses


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    path = write_state(tmp_path / "trainer_state.json", (1, 2), max_steps=2)
    state = json.loads(path.read_text())
    state["log_history"][0].update(loss=float("nan"), grad_norm=float("inf"), note="text")
    state["log_history"] += [None, {"loss": 1.0}, {"step": "3"}]
    path.write_text(json.dumps(state))
    assert [sorted(entry) for entry in read_run(tmp_path).log] == [
        ["epoch", "learning_rate", "step"],
        ["epoch", "learning_rate", "loss", "step"],
    ]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(GKDDataError, match=r"output_dir of a run that has logged something.*has no log entries$"):
        read_run(tmp_path)
    with pytest.raises(GKDDataError, match="expected the output_dir of a run; there is no folder"):
        read_run(tmp_path / "none")
    write_records(tmp_path, [])
    write_state(tmp_path / "trainer_state.json", ())
    with pytest.raises(GKDDataError, match="has no log entries"):
        read_run(tmp_path)


def test_numbers_that_no_float_holds_are_gaps(tmp_path):
    path = write_state(tmp_path / "trainer_state.json", (1, 2), max_steps=2)
    state = json.loads(path.read_text())
    state["log_history"][0].update(loss=10**400, grad_norm=1e308)
    state["log_history"] += [{"step": 10**400, "loss": 1.0}, {"step": -1, "loss": 1.0}]
    path.write_text(json.dumps(state))
    records = write_records(tmp_path, [record(1), record(2)])
    lines = records.read_text().splitlines()
    records.write_text("\n".join([lines[0], lines[1].replace('"loss":1.0', f'"loss":1{"0" * 400}'), lines[2]]) + "\n")
    run = read_run(tmp_path)
    assert [(entry["step"], entry.get("loss")) for entry in run.log] == [(1, None), (2, 0.5)]
    assert "loss" not in run.records[0].metrics
    run_page([run])

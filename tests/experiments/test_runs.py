"""An experiment from end to end, tiny: every arm of the errands trains, and a second call has nothing to do."""

import contextlib
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from experiments import errand_study, runner, studies
from experiments.arms import ARMS, is_timed
from experiments.draft_study import DraftStudy
from experiments.lines import Lines
from experiments.studies import Run


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Options of the command, for a study shrunk to seconds."""
    for name, value in {"TEACHER_STEPS": 1, "START_STEPS": 1, "HELD_OUT": 3, "MAX_NEW_TOKENS": 24}.items():
        monkeypatch.setattr(errand_study, name, value)
    monkeypatch.setitem(errand_study._OPTIONS, "per_device_train_batch_size", 2)
    return Namespace(results=tmp_path / "results", models=tmp_path / "models", pair=None, workers=1, grid="small")


FACTORS = {"width": 16, "demonstrations": 6}


def test_arms_of_every_kind_train_from_one_start_and_are_measured_on_the_way(options):
    arms = ("sft", "seq-kd", "fresh-jsd", "own-jsd", "rising-jsd", "sft-longer")
    for arm in arms:
        runner.do(options, "errands", Run(arm, 0, 2, FACTORS))
    results = Lines(options.results / "errands.jsonl").read()
    assert [result["arm"] for result in results] == [*arms]
    starts = {str({**result["points"][0], "seconds": 0, "cpu_seconds": 0}) for result in results}
    assert len(starts) == 1  # all from the same student
    for result in results:
        last = result["points"][-1]
        assert last["step"] == result["trained_steps"]
        assert last["cpu_seconds"] > 0
        assert {len(values) for values in last["by_prompt"].values()} == {3}
    by_arm = {result["arm"]: result for result in results}
    assert by_arm["sft-longer"]["trained_steps"] > by_arm["sft"]["trained_steps"] == 2


@pytest.mark.parametrize("changed", ["START_STEPS", "TEACHER_STEPS", "MAX_NEW_TOKENS"])
def test_models_that_another_plan_made_are_not_used(options, monkeypatch, changed):
    run = Run("sft", 0, 2, FACTORS)
    study = runner.study_of(options, "errands")
    before = study.setting(run).student(0).state_dict()
    torch.testing.assert_close(study.setting(run).student(0).state_dict(), before, rtol=0, atol=0)
    monkeypatch.setattr(errand_study, changed, getattr(errand_study, changed) + 1)
    with pytest.raises(SystemExit, match=r"was made by another plan \((steps|max_length, max_new_tokens)\): delete it"):
        study.setting(run).student(0)


@pytest.mark.parametrize("arm", ["sft", "fixed-jsd"])
def test_a_result_counts_the_tokens_that_the_student_has_learnt_from(options, arm):
    runner.do(options, "errands", Run(arm, 0, 3, FACTORS))  # three steps of two are one epoch
    [result] = Lines(options.results / "errands.jsonl").read()
    demonstrations = [errand.demonstration() for errand in errand_study.errands.errands(6, 0)]
    assert result["points"][0]["tokens"] == 0
    assert result["points"][-1]["tokens"] == sum(map(len, demonstrations))


def test_a_run_with_a_result_is_not_done_again(options, monkeypatch):
    runs = [Run("sft", seed, 2, FACTORS) for seed in range(2)]
    monkeypatch.setattr(errand_study.ErrandStudy, "runs", lambda self, grid: runs)
    runner.do(options, "errands", runs[0])
    done = []
    monkeypatch.setattr(runner, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(runner, "do", lambda options, name, run: done.append(run) or run)
    runner.run_all(options, "errands")
    assert done == runs[1:]


def test_a_second_process_does_not_add_to_the_same_results(options, monkeypatch):
    monkeypatch.setattr(errand_study.ErrandStudy, "runs", lambda self, grid: [])
    runner.run_all(options, "errands")
    with FileLock(options.results / "errands.lock"), pytest.raises(SystemExit, match=r"errands\.jsonl: wait for it"):
        runner.run_all(options, "errands")


class _Pool(contextlib.nullcontext):
    """A pool of this process alone."""

    def __init__(self, *args, **options):
        super().__init__(self)

    def map(self, function, *inputs):
        return map(function, *inputs)


def test_the_time_of_measuring_is_not_counted_and_that_of_the_teachers_samples_is(options, monkeypatch):
    def busy(seconds):
        began = time.process_time()
        while time.process_time() - began < seconds:
            pass

    examined = errand_study._Examination.__call__
    monkeypatch.setattr(errand_study._Examination, "__call__", lambda *args: busy(3) or examined(*args))
    runner.do(options, "errands", Run("sft", 0, 2, FACTORS))
    sampled = errand_study.completions
    monkeypatch.setattr(errand_study, "completions", lambda *args, **kw: busy(5) or sampled(*args, **kw))
    monkeypatch.setattr(errand_study, "_Examination", lambda teacher: lambda student: {"by_prompt": {}})
    runner.do(options, "errands", Run("seq-kd", 0, 2, FACTORS))
    sft, seq_kd = Lines(options.results / "errands.jsonl").read()
    assert sft["points"][-1]["cpu_seconds"] < 3
    assert 5 < seq_kd["points"][-1]["cpu_seconds"] < 8
    assert seq_kd["points"][0]["cpu_seconds"] == 0


def test_the_teacher_is_measured_like_a_student(options):
    runner.do(options, "errands", Run("teacher", 0, 2, FACTORS))
    [result] = Lines(options.results / "errands.jsonl").read()
    [point] = result["points"]
    assert point["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert point["acceptance"] == pytest.approx(1, abs=1e-5)


def test_the_command_runs_in_processes_of_its_own_and_writes_its_tables(tmp_path, monkeypatch):
    code = """
import sys
from experiments import errand_study
from experiments.studies import Run
errand_study.ErrandStudy.runs = lambda self, grid: [Run("sft", 0, 1, {"width": 16, "demonstrations": 6})]
from experiments.__main__ import main
main(sys.argv[1:])
"""
    folders = ["--results", tmp_path / "results", "--models", tmp_path / "models"]
    # As the processes will find them: the models that all runs share, without the minutes that they train for.
    with monkeypatch.context() as shortened:
        shortened.setattr(errand_study.errands, "trained_teacher", lambda **plan: errand_study.errands.model(16, 1, 0))
        shortened.setattr(studies, "trained", lambda setting, arm, seed, *args, **options: (setting.student(seed), {}))
        shortened.setattr(errand_study, "_Examination", lambda teacher: None)
        study = errand_study.ErrandStudy(tmp_path / "models" / "errands")
        study.setting(Run("sft", 0, 1, FACTORS)).student(0)
    command = [sys.executable, "-c", code, "run", "--studies", "errands", "--workers", "1", *map(str, folders)]
    subprocess.run(command, check=True, timeout=240, cwd=Path(__file__).parents[2])
    [result] = Lines(tmp_path / "results" / "errands.jsonl").read()
    assert result["trained_steps"] == 1
    assert "| sft |" in (tmp_path / "results" / "errands.md").read_text()


@pytest.mark.parametrize("grid", ["small", "full"])
def test_runs_of_a_grid_are_distinct_and_those_that_need_a_time_come_after_it(grid, tmp_path):
    for study in (errand_study.ErrandStudy(tmp_path), DraftStudy(tmp_path, tmp_path)):
        keys = [run.key for run in study.runs(grid)]
        assert len({*map(str, keys)}) == len(keys)
        for run in study.runs(grid):
            if is_timed(run.arm):
                reference = ARMS[run.arm].as_long_as
                place = keys.index(run.key)
                assert all(keys.index({**run.key, "arm": needed}) < place for needed in (reference, "sft"))


def test_the_full_grid_has_the_seeds_that_the_plan_names(tmp_path):
    for study, seeds in ((errand_study.ErrandStudy(tmp_path), 5), (DraftStudy(tmp_path, tmp_path), 3)):
        for arm in ARMS:
            assert len({run.seed for run in study.runs("full") if run.arm == arm}) == seeds

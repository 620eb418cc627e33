"""The draft models from end to end, with tiny models: what is measured, and when."""

from argparse import Namespace

import pytest

from experiments import draft_study, runner
from experiments.draft_study import DraftStudy
from experiments.lines import Lines
from experiments.measures import compared
from experiments.studies import Run


@pytest.fixture
def options(tiny_model, byte_level, monkeypatch, tmp_path):
    """Options of the command, for a study shrunk to seconds, and a pair of tiny models."""
    shrunk = {"HELD_OUT": 3, "ASSISTED": 1, "DRAFTS": (2,), "MAX_NEW_TOKENS": 6, "STARTING": 1}
    for name, value in shrunk.items():
        monkeypatch.setattr(draft_study, name, value)
    for seed, name in enumerate(("teacher", "student")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    return Namespace(results=tmp_path / "results", models=tmp_path / "models", pair=tmp_path, grid="small")


def test_a_student_is_measured_as_a_draft_model_before_and_after_training(options):
    for arm in ("sft", "own-forward"):
        runner.do(options, "drafts", Run(arm, 0, 2, {}))
    for result in Lines(options.results / "drafts.jsonl").read():
        assert [point["step"] for point in result["points"]] == [0, 1, 2]
        start, half, end = result["points"]
        assert not {"sampled_2", "greedy_2", "own_reverse_kl"} & half.keys()
        for point in (start, end):
            assert {"sampled_2", "greedy_2", "own_reverse_kl"} <= point.keys()
            assert 1 <= point["greedy_2"] <= 3
        for point in (start, half, end):
            assert 0 < point["acceptance"] < 1
            assert len(point["by_prompt"]["acceptance"]) == 3


def test_other_seeds_do_not_draft(options):
    runner.do(options, "drafts", Run("sft", 1, 1, {}))
    [result] = Lines(options.results / "drafts.jsonl").read()
    for point in (result["points"][0], result["points"][-1]):
        assert "own_reverse_kl" in point
        assert not {"sampled_2", "greedy_2"} & point.keys()


def test_the_means_are_over_the_tokens_of_all_prompts(options):
    study = DraftStudy(options.models, options.pair)
    examination = study.setting(Run("sft", 0, 2, {})).measure
    student, teacher, rows = study._model("student"), study._teacher, examination._teachers_rows
    found = examination(student)
    together = compared(student, teacher, rows, study._tokenizer.pad_token_id, batch_size=len(rows))
    assert {name: found[name] for name in together} == pytest.approx(together, rel=1e-4)


def test_no_student_learns_on_a_prompt_that_it_is_measured_on(options):
    study = DraftStudy(options.models, options.pair)
    learnt = {
        str([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
        for row in study._rows(0)
    }
    assert len(study._held_out_prompts) == 3
    assert not learnt & {str(prompt) for prompt in study._held_out_prompts}

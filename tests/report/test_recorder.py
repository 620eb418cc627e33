"""What a run keeps for its report, as real trainers write it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from gkd_trainer.report.document import run_page
from gkd_trainer.report.recorder import FACTS
from gkd_trainer.report.records import FILE_NAME, read_records
from gkd_trainer.report.run import read_run
from gkd_trainer.teachers import FrozenTeacher, OtherTokenizerTeacher, WeightedTeachers
from tests.trainer.run import FSDP
from tests.vocabularies import sentencepiece_backend, sentencepiece_like


@pytest.fixture
def trained(make_trainer):
    """Train with options, and return the trainer and what it kept."""

    def train(**options):
        trainer = make_trainer(**{"report_samples": 2, "lmbda": 0.5, "max_steps": 3, **options})
        trainer.train()
        return trainer, read_records(file_of(trainer))

    return train


def file_of(trainer):
    return Path(trainer.args.output_dir) / FILE_NAME


def test_a_run_keeps_samples_and_positions_of_every_log_entry(trained):
    trainer, held = trained()
    entries = [record for record in held.records if record.samples]
    assert [(record.step, record.sampled_step, len(record.samples)) for record in entries] == [
        (1, 1, 2),
        (2, 2, 2),
        (3, 3, 2),
    ]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for record, entry in zip(entries, log, strict=True):
        assert record.metrics["loss"] == entry["loss"]
        total = sum(sum(d * n for d, n in zip(m.divergence, m.tokens, strict=True)) for m in record.positions.values())
        tokens = sum(sum(means.tokens) for means in record.positions.values())
        assert total / tokens == pytest.approx(entry["loss"], rel=1e-4)  # one batch per step: the same mean
    assert held.facts.max_steps == 3
    assert held.facts.options["lmbda"] == 0.5


def test_the_kept_numbers_average_to_the_logged_divergence(trained):
    # All samples of a step: 4 of one batch.
    trainer, held = trained(report_samples=99, lmbda=0.0, max_steps=1)
    values = [value for sample in held.records[0].samples for value in sample.divergence if value is not None]
    logged = trainer.state.log_history[0]["divergence_off_policy"]
    assert sum(values) / len(values) == pytest.approx(logged, rel=1e-3)
    assert len(held.records[0].samples) == 4


def test_entries_of_several_steps_sample_the_first_of_them(trained):
    _, held = trained(max_steps=5, logging_steps=2, gradient_accumulation_steps=2, report_samples=6)
    entries = [record for record in held.records if record.positions]
    assert [(record.step, record.sampled_step) for record in entries] == [(2, 1), (4, 3)]
    assert [len(record.samples) for record in entries] == [6, 6]  # of two micro-batches of four


def test_recording_does_not_change_the_weights(make_trainer):
    weights = []
    for report_samples in (0, 3):
        trainer = make_trainer(report_samples=report_samples, lmbda=0.5, max_steps=3)
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_without_the_option_no_file_is_written(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not file_of(trainer).exists()


def test_a_resumed_run_continues_its_file(make_trainer):
    options = {"report_samples": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    trainer = make_trainer(**options)
    before = read_records(file_of(trainer))
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    after = read_records(file_of(trainer))
    steps = [record.step for record in after.records if record.samples]
    assert steps == [record.step for record in before.records if record.samples] == [1, 2, 3, 4]
    assert after.records[:2] == before.records[:2]


def test_the_file_names_no_paths_and_only_listed_options(make_trainer, tiny_model, tmp_path):
    trainer = make_trainer(
        report_samples=1,
        max_steps=1,
        vllm_server_api_token="hunter2",
        run_name="secret-run",
    )
    trainer.model.config._name_or_path = str(tmp_path / "private" / "student")
    trainer.train()
    first = json.loads(file_of(trainer).read_text().splitlines()[0])
    assert set(first) == {"format", "student", "teacher", "max_steps", "options", "started"}
    assert set(first["options"]) == {*FACTS, "vocabulary_modes"}
    text = file_of(trainer).read_text()
    assert "hunter2" not in text
    assert "secret-run" not in text
    assert "/private/" not in text


def test_a_full_disk_ends_the_recording_and_not_the_run(make_trainer, monkeypatch, caplog):
    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gkd_trainer.report.records.RecordFile.append", full)
    trainer = make_trainer(report_samples=1, max_steps=3)
    with caplog.at_level(logging.WARNING):
        assert trainer.train().global_step == 3
    assert caplog.text.count("_report.jsonl is no longer written: [Errno 28] No space left") == 1


def test_an_evaluations_entry_is_kept_too(make_trainer, token_rows):
    trainer = make_trainer(
        report_samples=1, max_steps=2, eval_strategy="steps", eval_steps=2, trainer_args={"eval_dataset": token_rows(3)}
    )
    trainer.train()
    evaluated = [record for record in read_records(file_of(trainer)).records if "eval_loss" in record.metrics]
    assert [(record.step, record.samples) for record in evaluated] == [(2, ())]


def test_a_process_that_only_evaluates_leaves_the_file_of_the_run_as_it_is(make_trainer, token_rows):
    options = {"report_samples": 1, "max_steps": 2, "trainer_args": {"eval_dataset": token_rows(3)}}
    trainer = make_trainer(**options)
    trainer.train()
    trainer.evaluate()
    before = file_of(trainer).read_bytes()
    [*_, last] = read_records(file_of(trainer)).records
    assert (last.step, "eval_loss" in last.metrics) == (2, True)
    assert "eval_loss" in read_run(trainer.args.output_dir).log[-1]
    make_trainer(**options).evaluate()
    assert file_of(trainer).read_bytes() == before


@pytest.mark.parametrize("kind", ["top_k", "weighted"])
def test_other_teachers_are_recorded(trained, tiny_model, kind):
    first, second = (FrozenTeacher(tiny_model(hidden=48, seed=seed)) for seed in (1, 2))
    if kind == "top_k":
        teacher = FrozenTeacher(tiny_model(hidden=48, seed=1), top_k=3)
    else:
        teacher = WeightedTeachers({"a": first, "b": second}, {"a": 1.0, "b": 2.0})
    _, held = trained(trainer_args={"teacher": teacher}, max_steps=1)
    [sample, _] = held.records[0].samples
    assert {len(top) for top in sample.teacher_top} == {3 if kind == "top_k" else 5}


def test_a_teacher_with_another_tokenizer_is_recorded(trained, tiny_model):
    other = sentencepiece_like(sentencepiece_backend())
    inner = FrozenTeacher(tiny_model(hidden=48, vocab=len(other), seed=1), tokenizer=other)
    rows = Dataset.from_list([{"prompt": "one two", "completion": " three four five"}] * 4)
    _, held = trained(
        trainer_args={"teacher": OtherTokenizerTeacher(inner, mode="uld"), "train_dataset": rows},
        max_steps=1,
        lmbda=0.0,
    )
    assert held.facts.options["vocabulary_modes"] == ["uld"]
    [sample, _] = held.records[0].samples
    assert "".join(sample.text).startswith(" three four five")
    assert any(sample.teacher_top)
    [means] = held.records[0].positions.values()
    assert max(means.position) < len(sample)


ONE_STEP = {"report_samples": 3, "lmbda": 0.5, "max_steps": 1, "seed": 1, "names_teacher": True}


def test_two_ranks_that_share_the_student_keep_the_positions_of_both_and_samples_of_the_first(full_run, tmp_path):
    full_run(tmp_path / "one", per_device_train_batch_size=4, **ONE_STEP)
    _, _, process = full_run(tmp_path / "two", ranks=2, per_device_train_batch_size=2, **ONE_STEP, **FSDP)
    assert process.returncode == 0, process.stderr
    one, two = (read_records(tmp_path / name / "run" / FILE_NAME) for name in ("one", "two"))
    assert (replace(one.facts, started=None), two.unreadable) == (replace(two.facts, started=None), 0)
    [one], [two] = ([record for record in held.records if record.positions] for held in (one, two))
    assert (len(one.samples), len(two.samples)) == (3, 2)
    assert one.positions.keys() == two.positions.keys()
    for name, means in one.positions.items():
        assert means.tokens == two.positions[name].tokens
        torch.testing.assert_close(
            torch.tensor(means.divergence), torch.tensor(two.positions[name].divergence), rtol=1e-3, atol=1e-5
        )


def test_a_killed_run_has_a_report_and_its_continuation_a_whole_one(full_run, tmp_path):
    options = {"report_samples": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, _, process = full_run(tmp_path / "run", die_at=2, **options)
    assert process.returncode != 0
    killed = read_run(tmp_path / "run" / "run")
    assert killed.last_step == 2
    assert "the run is not finished" in killed.notes[0]
    run_page([killed])
    full_run(tmp_path / "run", resume=True, **options)
    whole = read_run(tmp_path / "run" / "run")
    assert (whole.last_step, whole.notes) == (4, ())
    assert [record.step for record in whole.records if record.samples] == [1, 2, 3, 4]

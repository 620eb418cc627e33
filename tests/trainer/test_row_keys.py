"""The keys of rows on their way through the trainer: from a column of the dataset to the teacher, past all models."""

import pytest
from transformers import DataCollatorWithPadding

from gkd_trainer.batch_keys import ROW_KEY
from gkd_trainer.teachers import FrozenTeacher


@pytest.fixture
def scored(monkeypatch):
    """What the teacher is given to score: (key, token ids) of each sample."""
    samples = []
    score = FrozenTeacher.score

    def recording(self, batch):
        masks_BL = batch.model_inputs["attention_mask"].bool()
        for key, ids_L, mask_L in zip(batch.side[ROW_KEY], batch.model_inputs["input_ids"], masks_BL, strict=True):
            samples.append((key.item(), ids_L[mask_L].tolist()))
        return score(self, batch)

    monkeypatch.setattr(FrozenTeacher, "score", recording)
    return samples


def prompts_by_key(rows):
    return {
        row[ROW_KEY]: [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        for row in rows
    }


@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "a stream"])
@pytest.mark.parametrize(
    "options", [{"lmbda": 0.0}, {"lmbda": 1.0}, {"lmbda": 0.5, "seq_kd": True}], ids=["data", "student", "both"]
)
def test_the_teacher_scores_each_sample_under_its_rows_key(make_trainer, token_rows, scored, options, is_stream):
    rows = token_rows(8).add_column(ROW_KEY, [100 + i for i in range(8)])
    dataset = rows.to_iterable_dataset() if is_stream else rows
    make_trainer(trainer_args={"train_dataset": dataset}, **options).train()
    prompts = prompts_by_key(rows)
    assert {key for key, _ in scored} == prompts.keys()
    assert all(ids[: len(prompts[key])] == prompts[key] for key, ids in scored)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_keys_pass_a_collator_that_pads_on_the_left(make_trainer, token_rows, byte_level, scored, lmbda):
    rows = token_rows(8).add_column(ROW_KEY, list(range(8)))
    tokenizer = byte_level()
    tokenizer.padding_side = "left"
    arguments = {"train_dataset": rows, "data_collator": DataCollatorWithPadding(tokenizer)}
    make_trainer(trainer_args=arguments, lmbda=lmbda).train()
    prompts = prompts_by_key(rows)
    assert {key for key, _ in scored} == prompts.keys()
    assert all(ids[: len(prompts[key])] == prompts[key] for key, ids in scored)


def test_no_key_reaches_a_forward(make_trainer, token_rows, scored):
    rows = token_rows(8).add_column(ROW_KEY, list(range(8)))
    trainer = make_trainer(trainer_args={"train_dataset": rows, "eval_dataset": rows}, lmbda=0.5)
    seen = set()
    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    assert scored
    assert "input_ids" in seen
    assert ROW_KEY not in seen


def test_a_batch_without_keys_gives_the_teacher_none(make_trainer, monkeypatch):
    sides = []
    score = FrozenTeacher.score
    monkeypatch.setattr(FrozenTeacher, "score", lambda self, batch: (sides.append(batch.side), score(self, batch))[1])
    make_trainer().train()
    assert sides
    assert not any(sides)


@pytest.mark.parametrize("rollout_steps", [1, 4, 16])
def test_each_row_of_a_stream_is_trained_on_in_each_epoch(make_trainer, token_rows, scored, rollout_steps):
    """Reading ahead for several steps comes to the stream's end before its last rows are trained on."""
    rows = token_rows(10).add_column(ROW_KEY, list(range(10)))
    make_trainer(
        trainer_args={"train_dataset": rows.to_iterable_dataset()},
        lmbda=1.0,
        max_new_tokens=2,
        rollout_steps=rollout_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=20,
    ).train()
    assert [key for key, _ in scored] == [*range(10), *range(10)]

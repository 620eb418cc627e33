"""Neither completions nor losses depend on which rows share a batch, whatever the architecture does with padding."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from gkd_trainer.batch_keys import PROMPT_IDS

RECURRENT = ["rwkv", "recurrent_gemma", "mamba"]
FAMILIES = ["llama", "gpt2", *RECURRENT]


def pair(tiny_model, student, teacher="llama"):
    models = tiny_model(student, layers=3), tiny_model(teacher, layers=3, seed=1)
    with torch.no_grad():
        for model in models:  # a new model's pad embedding is zero, and leaves no trace in a recurrent state
            model.get_input_embeddings().weight[2].normal_()
    return dict(zip(("model", "teacher_model"), models, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_does_not_depend_on_rollout_batch_size(make_trainer, tiny_model, family):
    losses = []
    for rollout_batch_size in (None, 1, 2):
        trainer = make_trainer(
            trainer_args=pair(tiny_model, family), lmbda=1.0, rollout_batch_size=rollout_batch_size, max_steps=1
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_does_not_depend_on_the_side_or_amount_of_padding(make_trainer, tiny_model, byte_level, family):
    """With the architecture as the student and as the teacher: each row alone, and all in a batch padded on a side."""
    trainer = make_trainer(trainer_args=pair(tiny_model, family, family))
    trainer.model.eval()
    rows = [trainer.train_dataset[index] for index in range(4)]
    rows[1] = {"input_ids": rows[1]["input_ids"], "labels": rows[1]["input_ids"]}  # trained on from its second token on
    assert len({len(row["input_ids"]) for row in rows}) > 1
    one = torch.tensor(1)
    with torch.no_grad():
        alone = sum(
            trainer.compute_loss(trainer.model, trainer.data_collator([row]), num_items_in_batch=one).item()
            for row in rows
        )
        for side in ("right", "left"):
            tokenizer = byte_level()
            tokenizer.padding_side = side
            collator = make_trainer(
                trainer_args={"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
            ).data_collator
            inputs = collator(rows)
            assert inputs["attention_mask"][:, 0].all() == (side == "right")
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=one)
            assert loss.item() == pytest.approx(alone, rel=1e-4)


def left_padded(rows):
    length = max(len(row["input_ids"]) for row in rows)

    def padded(fill, values):
        return torch.tensor([[fill] * (length - len(own)) + list(own) for own in values])

    return {
        "input_ids": padded(0, [row["input_ids"] for row in rows]),
        "labels": padded(-100, [row["labels"] for row in rows]),
        "attention_mask": padded(0, [[1] * len(row["input_ids"]) for row in rows]),
    }


def test_predictions_labels_and_inputs_of_an_evaluation_are_in_the_collators_columns(make_trainer, tiny_model):
    seen = {}

    def compute_metrics(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids, ids=prediction.inputs)
        return {}

    trainer = make_trainer(
        trainer_args={
            **pair(tiny_model, "gpt2"),
            "data_collator": left_padded,
            "compute_metrics": compute_metrics,
        },
        include_for_metrics=["inputs"],
    )
    rows = trainer.train_dataset.select(range(4))
    trainer.evaluate(rows)
    assert len({len(row["labels"]) for row in rows}) > 1
    for row, logits_LV, labels_L, ids_L in zip(rows, seen["logits"], seen["labels"], seen["ids"], strict=True):
        length = len(row["labels"])
        assert ids_L[-length:].tolist() == row["input_ids"]
        assert labels_L[-length:].tolist() == row["labels"]
        assert (labels_L[:-length] == -100).all()
        with torch.no_grad():
            expected_LV = trainer.model(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits_LV[-length:]), expected_LV, atol=1e-4, rtol=1e-4)


def test_an_evaluation_completes_prompts_as_long_as_its_padded_rows(make_trainer, monkeypatch):
    rows = [
        {"input_ids": [11, 12, 13, 2], "labels": [-100, -100, 13, 2], PROMPT_IDS: [21, 22, 23, 24]},
        {"input_ids": [31, 32, 33, 34, 35, 2], "labels": [-100] * 4 + [35, 2], PROMPT_IDS: [31, 32, 33, 34, 40, 41]},
    ]
    trainer = make_trainer(trainer_args={"data_collator": left_padded}, eval_on_policy=True)
    completed = []
    generate = trainer.rollouts.generate

    def recorded(prompts, *args):
        completed.extend(list(prompt) for prompt in prompts)
        return generate(prompts, *args)

    monkeypatch.setattr(trainer.rollouts, "generate", recorded)
    trainer.evaluate(Dataset.from_list(rows))
    assert completed == [row[PROMPT_IDS] for row in rows]

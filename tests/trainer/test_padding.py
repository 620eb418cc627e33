"""Neither completions nor losses depend on which rows share a batch, whatever the architecture does with padding."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

from gkd_trainer import GKDArguments, GKDDataError, GKDMixin, GKDTrainer
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


class Rows(torch.utils.data.Dataset):
    """Rows of a dataset that is used as is."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@dataclass
class SFTOptions(GKDArguments, SFTConfig):
    pass


class SFT(GKDMixin, SFTTrainer):
    pass


@pytest.mark.parametrize("padding", ["before", "behind"])
def test_a_torch_data_set_gives_the_batches_of_its_rows_in_a_list(make_trainer, padding):
    rows = []
    for length in (3, 5, 4, 2):
        answer, zeros = [0] + [1] * (length - 1), [0] * (6 - length)
        columns = {"input_ids": [*range(5, 5 + length)], "attention_mask": [1] * length, "completion_mask": answer}
        rows.append(
            {name: zeros + values if padding == "before" else values + zeros for name, values in columns.items()}
        )
    batches = []
    for dataset in (rows, Rows(rows)):
        [batch] = make_trainer(trainer_args={"eval_dataset": dataset}).get_eval_dataloader()
        batches.append(batch)
    assert batches[0]["labels"].tolist()[0] == [-100, 6, 7, -100, -100]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize("trainer_class", [GKDTrainer, SFT])
def test_samples_that_share_a_row_do_not_see_one_another(make_trainer, config, trainer_class):
    args = config(SFTOptions) if trainer_class is SFT else config()
    apart = [{"input_ids": ids} for ids in ([5, 6, 7, 8], [9, 10, 11], [12, 13])]
    packed = [
        {"input_ids": [5, 6, 7, 8, 9, 10, 11], "position_ids": [0, 1, 2, 3, 0, 1, 2]},
        {"input_ids": [12, 13], "position_ids": [0, 1]},
    ]
    losses = [
        make_trainer(
            trainer_class=trainer_class, trainer_args={"args": args, "eval_dataset": Dataset.from_list(rows)}
        ).evaluate()["eval_loss"]
        for rows in (apart, packed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_samples_that_share_a_row_are_refused_if_they_are_to_be_completed(make_trainer):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(GKDDataError, match=r"position_ids .* must count up by one, .* got \[0, 1, 0, 1\]: give each"):
        make_trainer(trainer_args={"train_dataset": [row] * 4}, lmbda=1.0).train()

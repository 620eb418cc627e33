"""The prompts of on-policy samples on their way through the trainer: the same as at inference."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer import GKDArguments, GKDMixin, GKDTrainer, HFRollouts
from gkd_trainer.batch_keys import PROMPT_IDS
from gkd_trainer.data import unwrapped
from gkd_trainer.rollouts import RolloutEngine
from gkd_trainer.types import Completion
from tests.data.templates import CHATS
from tests.versions import IN_ORDER

VOCAB = 432
QUESTIONS = ["hello there", "one two three", "What is the capital of France?", "how are you today?"]
ANSWERS = ["hello", "four five six", "Paris.", "I am fine, thank you."]
THINKS = "qwen3"  # in a row, earlier answers get an empty reasoning that the model is not given at inference


class Recording(RolloutEngine):
    """Completes each prompt with the same tokens, and keeps the prompts."""

    def __init__(self):
        self.prompts = []

    def generate(self, prompts, sampling, seeds):
        self.prompts += [list(prompt) for prompt in prompts]
        return [Completion([7, 8, 2], is_finished=True) for _ in prompts]

    def sync(self, model):
        pass

    def close(self):
        pass


class Inspecting(GKDTrainer):
    """Keeps the batches that are scored, and what reaches the student's forward."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), dict(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def conversations(chat):
    system = [{"role": "system", "content": "You are helpful."}] if chat.takes_system else []
    return [
        [
            *system,
            {"role": "user", "content": "hello there"},
            {"role": "assistant", "content": "hello, how are you?"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]


def expected_prompts(tokenizer, chat):
    return [
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        for messages in conversations(chat)
    ]


@pytest.fixture
def train(make_trainer, chat_tokenizer, tiny_model):
    """Make a trainer for a chat whose rows are its conversations; the engine records the prompts."""

    def make(chat, rows=None, *, trainer_args=None, trainer_class=Inspecting, **options):
        tokenizer = chat_tokenizer(chat)
        student = tiny_model(vocab=VOCAB)
        student.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([chat.eos, *chat.stops])
        arguments = {
            "model": student,
            "teacher_model": tiny_model(vocab=VOCAB, hidden=48, seed=1),
            "processing_class": tokenizer,
            "rollouts": Recording(),
            "train_dataset": rows or [{"messages": messages} for messages in conversations(chat)],
            **(trainer_args or {}),
        }
        defaults = {"lmbda": 1.0, "max_steps": 1, "max_length": 512, **IN_ORDER}
        return make_trainer(trainer_class=trainer_class, trainer_args=arguments, **{**defaults, **options}), tokenizer

    return make


@pytest.mark.parametrize("name", CHATS)
def test_the_engine_is_given_the_inference_prompt_whatever_the_format_of_the_row(train, name):
    chat = CHATS[name]
    messages = conversations(chat)
    rows = [
        {"messages": messages[0]},
        {"prompt": messages[1][:-1]},
        {"prompt": messages[2][:-1], "completion": messages[2][-1:]},
        {"messages": messages[3]},
    ]
    trainer, tokenizer = train(chat, rows)
    trainer.train()
    expected = expected_prompts(tokenizer, chat)
    assert trainer.rollouts.prompts == expected
    [batch] = trainer.batches
    samples = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert samples == [[*prompt, 7, 8, 2] for prompt in expected]
    assert all(labels[labels != -100].tolist() == [7, 8, 2] for labels in batch["labels"])


@pytest.mark.parametrize("kind", ["trl", "padding", "seq2seq", "stream"])
def test_prompts_pass_any_collator_and_data_set(train, chat_tokenizer, kind):
    chat = CHATS[THINKS]
    tokenizer = chat_tokenizer(chat)
    collators = {
        "trl": DataCollatorForLanguageModeling(pad_token_id=0),
        "padding": DataCollatorWithPadding(tokenizer),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }
    arguments = {"data_collator": collators.get(kind)}
    if kind == "stream":
        rows = Dataset.from_list([{"messages": messages} for messages in conversations(chat)])
        arguments["train_dataset"] = rows.to_iterable_dataset()
    trainer, _ = train(chat, trainer_args=arguments)
    trainer.train()
    assert trainer.rollouts.prompts == expected_prompts(tokenizer, chat)


def test_prompts_pass_through_trls_trainer(train, config):
    @dataclasses.dataclass
    class SFTOptions(GKDArguments, SFTConfig):
        pass

    class SFT(GKDMixin, SFTTrainer):
        pass

    chat = CHATS[THINKS]
    args = config(SFTOptions, lmbda=1.0, max_steps=1, max_length=512, **IN_ORDER)
    rows = Dataset.from_list([{"messages": messages} for messages in conversations(chat)])
    trainer, tokenizer = train(chat, rows, trainer_args={"args": args}, trainer_class=SFT)
    trainer.train()
    assert trainer.rollouts.prompts == expected_prompts(tokenizer, chat)


def test_prompts_are_the_tokens_before_the_answer_if_a_collator_makes_its_own_batch(train):
    chat = CHATS[THINKS]

    def own(rows):
        ids = torch.tensor([[5, 6, 7, 8]] * len(rows))
        labels = ids.clone()
        labels[:, :2] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    trainer, _ = train(chat, trainer_args={"data_collator": own})
    trainer.train()
    assert trainer.rollouts.prompts == [[5, 6]] * 4


def test_off_policy_rows_keep_their_labels(train):
    trainer, _ = train(CHATS[THINKS], lmbda=0.5)
    trainer.train()
    [batch] = trainer.batches
    assert set(batch["is_on_policy"].tolist()) == {True, False}
    for row, is_on_policy, labels in zip(
        trainer.train_dataset, batch["is_on_policy"], batch["labels"].tolist(), strict=True
    ):
        trained = [label for label in labels if label != -100]
        assert trained == ([7, 8, 2] if is_on_policy else [label for label in row["labels"] if label != -100])


def test_no_prompt_reaches_a_forward(train):
    trainer, _ = train(CHATS[THINKS], lmbda=0.5)
    seen = set()
    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    assert PROMPT_IDS in trainer.batches[0]
    assert "input_ids" in seen
    assert PROMPT_IDS not in seen


def test_off_policy_training_adds_nothing_to_rows_and_batches(train):
    trainer, _ = train(CHATS[THINKS], lmbda=0.0)
    trainer.train()
    assert PROMPT_IDS not in trainer.train_dataset.column_names
    assert type(unwrapped(trainer.data_collator)) is DataCollatorForLanguageModeling
    assert PROMPT_IDS not in trainer.batches[0]


def test_evaluation_completes_the_inference_prompts(train):
    chat = CHATS[THINKS]
    rows = [{"messages": messages} for messages in conversations(chat)[:2]]
    rows += [{"prompt": messages[:-1]} for messages in conversations(chat)[2:]]
    trainer, tokenizer = train(chat, trainer_args={"eval_dataset": rows}, lmbda=0.0, eval_on_policy=True)
    trainer.evaluate()
    first, second, third, fourth = expected_prompts(tokenizer, chat)
    # The prompts alone, then all rows: those that have a completion by now are completed from the same prompt.
    assert trainer.rollouts.prompts == [third, fourth, first, second, third, fourth]


def test_completions_saved_in_a_checkpoint_are_found_again(train, tmp_path):
    def run(folder, *, resumes=False):
        options = {"output_dir": str(tmp_path / folder), "rollout_steps": 2, "max_steps": 4, "logging_steps": 1}
        saving = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
        engine = {"rollouts": HFRollouts(stop_ids=[2], vocab_size=VOCAB)}
        trainer, _ = train(CHATS[THINKS], trainer_args=engine, **options, **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1") if resumes else None)
        return trainer

    whole, resumed = run("whole"), run("resumed", resumes=True)
    kept = tmp_path / "whole" / "checkpoint-1" / "rollouts-rank0.json"
    assert kept.exists()
    expected = [batch["input_ids"].tolist() for batch in whole.batches[1:]]
    assert [batch["input_ids"].tolist() for batch in resumed.batches] == expected


def test_a_student_that_does_not_stop_at_its_templates_end_of_turn_is_warned_about(train, caplog):
    chat = dataclasses.replace(CHATS["gemma3"], stops=())
    _, tokenizer = train(chat)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    [warning] = [record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()]
    assert warning == (
        "train: in 4 of 4 rows the last assistant turn ends with '<end_of_turn>', at which generation does not end "
        f"(generation ends at '<eos>' ({tokenizer.eos_token_id})): add its id, {end}, to eos_token_id in the student's "
        "generation_config"
    )


def test_unprepared_rows_and_their_collator_are_not_changed(train):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}] * 4)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    trainer, _ = train(
        CHATS[THINKS],
        rows,
        trainer_args={"data_collator": collator},
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    assert trainer.data_collator is collator
    assert trainer.train_dataset is rows
    trainer.train()
    assert trainer.rollouts.prompts == [[5, 6]] * 4

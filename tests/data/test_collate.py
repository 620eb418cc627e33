"""Collators keep the labels of the rows, and the prompts of their completions."""

import pickle

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from gkd_trainer.data import KeepPrompts, keeping_labels
from gkd_trainer.types import PROMPT_IDS

ROWS = [
    {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]},
    {"input_ids": [8, 2], "labels": [-100, 2]},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [DataCollatorWithPadding, DataCollatorForLanguageModeling])
def test_labels_stand_where_their_tokens_do(byte_level, kind, side):
    tokenizer = byte_level()
    tokenizer.padding_side = side
    options = {"mlm": False} if kind is DataCollatorForLanguageModeling else {}
    batch = keeping_labels(kind(tokenizer, **options))(ROWS)
    short = [-100, -100, -100, 2] if side == "left" else [-100, 2, -100, -100]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], short]


def test_other_collators_are_left_as_they_are(byte_level):
    seq2seq = DataCollatorForSeq2Seq(byte_level())
    assert keeping_labels(seq2seq) is seq2seq


def with_prompts(*prompts):
    return [{**row, PROMPT_IDS: prompt} for row, prompt in zip(ROWS, prompts, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["trl", "keeping labels", "seq2seq"])
def test_prompts_go_around_any_collator(byte_level, kind, side):
    tokenizer = byte_level()
    tokenizer.padding_side = side
    collators = {
        "trl": TRLCollator(pad_token_id=2),
        "keeping labels": keeping_labels(DataCollatorWithPadding(tokenizer)),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }
    batch = KeepPrompts(collators[kind])(with_prompts([], [8, 9, 10]))
    assert batch.pop(PROMPT_IDS).tolist() == [[-100] * 3, [8, 9, 10]]
    plain = collators[kind](ROWS)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)


def test_rows_without_prompts_of_their_own_give_a_batch_without_them():
    assert PROMPT_IDS not in KeepPrompts(TRLCollator(pad_token_id=0))(with_prompts([], []))
    assert PROMPT_IDS not in KeepPrompts(TRLCollator(pad_token_id=0))(ROWS)


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[::-1], lambda rows: rows[:1], lambda rows: [{**row, "input_ids": [3] * 9} for row in rows]],
    ids=["reordered", "left out", "of its own"],
)
def test_a_collator_whose_samples_are_other_rows_gives_no_prompts(change):
    trl = TRLCollator(pad_token_id=0)

    def collator(rows):
        return trl([{"input_ids": row["input_ids"]} for row in change(rows)])

    assert PROMPT_IDS not in KeepPrompts(collator)(with_prompts([5], [8]))


def test_a_collator_that_cuts_its_rows_keeps_the_prompts():
    trl = TRLCollator(pad_token_id=0)

    def cutting(rows):
        return trl([{key: value[:3] for key, value in row.items()} for row in rows])

    assert KeepPrompts(cutting)(with_prompts([5], [8]))[PROMPT_IDS].tolist() == [[5], [8]]


def test_rows_that_are_not_mappings_go_to_the_collator_as_they_are():
    assert KeepPrompts(list)([1, 2]) == [1, 2]


def test_other_attributes_are_those_of_the_collator(byte_level):
    tokenizer = byte_level()
    collator = KeepPrompts(DataCollatorWithPadding(tokenizer))
    assert collator.tokenizer is tokenizer  # Trainer saves it
    assert pickle.loads(pickle.dumps(collator)).padding is True
    assert not hasattr(collator, "messages_key")

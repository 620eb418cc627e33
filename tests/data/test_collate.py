"""Collators keep the labels of the rows, the prompts of their completions, and their keys."""

import pickle

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from gkd_trainer.batch_keys import PROMPT_IDS, ROW_KEY
from gkd_trainer.data import KeepSideTensors, keeping_labels
from gkd_trainer.errors import GKDDataError

ROWS = [
    {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]},
    {"input_ids": [8, 2], "labels": [-100, 2]},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [DataCollatorWithPadding, DataCollatorForLanguageModeling])
def test_labels_are_aligned_with_their_tokens(byte_level, kind, side):
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
    batch = KeepSideTensors(collators[kind])(with_prompts([], [8, 9, 10]))
    assert batch.pop(PROMPT_IDS).tolist() == [[-100] * 3, [8, 9, 10]]
    plain = collators[kind](ROWS)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)


def test_rows_without_their_own_prompts_give_a_batch_without_prompts():
    assert PROMPT_IDS not in KeepSideTensors(TRLCollator(pad_token_id=0))(with_prompts([], []))
    assert PROMPT_IDS not in KeepSideTensors(TRLCollator(pad_token_id=0))(ROWS)


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[::-1], lambda rows: rows[:1], lambda rows: [{**row, "input_ids": [3] * 9} for row in rows]],
    ids=["reordered", "left out", "of its own"],
)
def test_a_collator_whose_samples_are_other_rows_gives_no_prompts_and_keys(change):
    trl = TRLCollator(pad_token_id=0)

    def collator(rows):
        return trl([{"input_ids": row["input_ids"]} for row in change(rows)])

    assert PROMPT_IDS not in KeepSideTensors(collator)(with_prompts([5], [8]))
    assert ROW_KEY not in KeepSideTensors(collator)(with_keys(5, 8))


def with_keys(*keys):
    return [{**row, ROW_KEY: key} for row, key in zip(ROWS, keys, strict=True)]


def own(rows):
    """A user's collator, which pads on the left, and refuses what it does not know."""
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    length = max(len(row["input_ids"]) for row in rows)
    padding = [length - len(row["input_ids"]) for row in rows]
    return {
        "attention_mask": torch.tensor([[0] * missing + [1] * (length - missing) for missing in padding]),
        **{
            name: torch.tensor([[filling] * missing + row[name] for missing, row in zip(padding, rows, strict=True)])
            for name, filling in (("input_ids", 0), ("labels", -100))
        },
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["trl", "keeping labels", "seq2seq", "own"])
def test_keys_go_around_any_collator(byte_level, kind, side):
    tokenizer = byte_level()
    tokenizer.padding_side = side
    collators = {
        "trl": TRLCollator(pad_token_id=2),
        "keeping labels": keeping_labels(DataCollatorWithPadding(tokenizer)),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
        "own": own,
    }
    batch = KeepSideTensors(collators[kind])(with_keys(2**60, -7))
    keys = batch.pop(ROW_KEY)
    assert keys.tolist() == [2**60, -7]
    assert keys.dtype == torch.int64
    plain = collators[kind](ROWS)
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)


def test_keys_and_prompts_go_together_and_rows_without_either_are_filled_up():
    rows = [{**ROWS[0], PROMPT_IDS: [5, 6, 9]}, {**ROWS[1], ROW_KEY: 3}]
    batch = KeepSideTensors(TRLCollator(pad_token_id=0))(rows)
    assert batch[PROMPT_IDS].tolist() == [[5, 6, 9], [-100] * 3]
    assert batch[ROW_KEY].tolist() == [-1, 3]


def test_a_key_that_is_not_an_integer_is_refused_by_its_row():
    with pytest.raises(GKDDataError, match=r"row 1 of a batch: expected a 64-bit integer as row_key; got 1\.5"):
        KeepSideTensors(TRLCollator(pad_token_id=0))(with_keys(1, 1.5))


def test_a_collator_that_cuts_its_rows_keeps_the_prompts():
    trl = TRLCollator(pad_token_id=0)

    def cutting(rows):
        return trl([{key: value[:3] for key, value in row.items()} for row in rows])

    assert KeepSideTensors(cutting)(with_prompts([5], [8]))[PROMPT_IDS].tolist() == [[5], [8]]


def test_rows_that_are_not_mappings_go_to_the_collator_as_they_are():
    assert KeepSideTensors(list)([1, 2]) == [1, 2]


def test_other_attributes_are_those_of_the_collator(byte_level):
    tokenizer = byte_level()
    collator = KeepSideTensors(DataCollatorWithPadding(tokenizer))
    assert collator.tokenizer is tokenizer  # Trainer saves it
    assert pickle.loads(pickle.dumps(collator)).padding is True
    assert not hasattr(collator, "messages_key")

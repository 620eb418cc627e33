"""Collators of transformers keep the labels of the rows."""

import pytest
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding

from gkd_trainer.data import keeping_labels

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

"""Collators keep the rows' labels and other values per token, the prompts of their completions, and their keys."""

import pickle

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from gkd_trainer.batch_keys import PROMPT_IDS, ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.data import EncoderDecoderCollator, KeepSideTensors, columns_read_by, keeping_token_values, only_pads
from gkd_trainer.data.collate import StackOthers
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
    batch = keeping_token_values(kind(tokenizer, **options))(ROWS)
    short = [-100, -100, -100, 2] if side == "left" else [-100, 2, -100, -100]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], short]


def test_other_collators_are_left_as_they_are(byte_level):
    seq2seq = DataCollatorForSeq2Seq(byte_level())
    assert keeping_token_values(seq2seq) is seq2seq


class CompletionOnly(DataCollatorForLanguageModeling):
    """Masks all tokens up to token 6, as TRL's former DataCollatorForCompletionOnlyLM did up to a template."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for ids_L, labels_L in zip(batch["input_ids"], batch["labels"], strict=True):
            labels_L[: ids_L.tolist().index(6) + 1] = -100
        return batch


class WithLengths(DataCollatorForLanguageModeling):
    """Adds to the batch, and chooses no labels."""

    def torch_call(self, examples):
        return {**super().torch_call(examples), "lengths": torch.tensor([len(row["input_ids"]) for row in examples])}


class OwnPadding(DataCollatorWithPadding):
    """Pads the labels itself."""

    def __call__(self, features):
        labels = [torch.tensor(row["labels"]) for row in features]
        batch = super().__call__([{"input_ids": row["input_ids"]} for row in features])
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
        return batch


def test_a_subclass_that_masks_labels_trains_on_what_it_leaves(byte_level):
    collator = keeping_token_values(CompletionOnly(byte_level(), mlm=False))
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [6, 9], "labels": [6, 9]}]
    assert collator(rows)["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]


def test_a_subclass_that_chooses_no_labels_gets_those_of_the_rows(byte_level):
    batch = keeping_token_values(WithLengths(byte_level(), mlm=False))(ROWS)
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]
    assert batch["lengths"].tolist() == [4, 2]


def test_a_subclass_that_pads_labels_itself_gets_them_and_keeps_its_own(byte_level):
    batch = keeping_token_values(OwnPadding(byte_level()))(ROWS)
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -1, -1]]


def test_a_subclass_that_changes_the_rows_tokens_without_labels_of_its_own_is_refused(byte_level):
    class Cutting(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return super().torch_call([{"input_ids": row["input_ids"][-3:]} for row in examples])

    with pytest.raises(GKDDataError, match=r"rows of \[4, 2\] tokens were collated to samples of \[3, 2\]: make the"):
        keeping_token_values(Cutting(byte_level(), mlm=False))(ROWS)


def test_a_subclass_that_returns_no_attention_mask_is_refused(byte_level):
    class WithoutMask(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return {name: value for name, value in super().torch_call(examples).items() if name != "attention_mask"}

    with pytest.raises(GKDDataError, match=r"WithoutMask returned no attention_mask, .* make it return one"):
        keeping_token_values(WithoutMask(byte_level(), mlm=False))(ROWS)


def padding_collators(tokenizer):
    return {
        "trl": TRLCollator(pad_token_id=0),
        "padding": DataCollatorWithPadding(tokenizer),
        "language modeling": DataCollatorForLanguageModeling(tokenizer, mlm=False),
    }


@pytest.fixture(params=["trl", "padding", "language modeling"])
def padding_collator(request, byte_level):
    """A collator of TRL or transformers, as the trainer wraps it."""
    return keeping_token_values(padding_collators(byte_level())[request.param])


def test_the_rows_own_padding_is_taken_out_on_either_side(padding_collator):
    rows = [
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": torch.tensor([8, 9, 0, 0, 0]), "attention_mask": torch.tensor([1, 1, 0, 0, 0])},
    ]
    batch = padding_collator(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks"])
def test_masks_say_what_is_trained_on_in_rows_without_labels(padding_collator, column):
    batch = padding_collator([{"input_ids": [5, 6, 7], column: [0, 0, 1]}, {"input_ids": [8, 9], column: [0, 1]}])
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert column not in batch


def test_positions_and_token_types_are_padded_and_filled_up(padding_collator):
    rows = [{**ROWS[0], "position_ids": [3, 4, 5, 6], "token_type_ids": [1, 1, 2, 2]}, ROWS[1]]
    batch = padding_collator(rows)
    assert batch["position_ids"].tolist() == [[3, 4, 5, 6], [0, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 2, 2], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert padding_collator(ROWS).keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["trl", "padding", "language modeling"])
def test_samples_that_share_a_row_are_told_apart_by_their_positions_alone(byte_level, kind, side):
    tokenizer = byte_level()
    tokenizer.padding_side = side
    packed = {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]}
    batch = keeping_token_values(padding_collators(tokenizer)[kind])([packed, ROWS[1]])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    # Nothing predicts the first token of the second sample.
    assert batch["labels"].tolist() == [[5, 6, 7, -100, 9], [-100, 2, -100, -100, -100]]


def test_rows_that_trl_packed_keep_their_samples_apart(padding_collator):
    """Such rows have no `position_ids`."""
    single = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[5, 6, 7], [-100, 9]]})
    batch = padding_collator(list(pack_dataset(single, 5)))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100, 9]]


def test_a_padding_free_collator_of_trl_reads_the_lengths_of_samples_itself():
    collator = keeping_token_values(TRLCollator(pad_token_id=0, padding_free=True))
    batch = collator([{"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1], "seq_lengths": [3, 2]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


def test_padding_free_batches_have_no_padding_of_the_rows_and_take_one_sample_per_row():
    collator = keeping_token_values(TRLCollator(pad_token_id=0, padding_free=True))
    padded = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "completion_mask": [0, 1, 1, 0]}
    batch = collator([padded, ROWS[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 2]]
    with pytest.raises(GKDDataError, match="position_ids of these rows start again: give one sample per row"):
        collator([{**ROWS[0], "position_ids": [0, 1, 0, 1]}])


def test_only_the_collators_that_pad_them_get_values_per_token_that_a_forward_does_not_take():
    def forward(input_ids, position_ids=None, inputs_embeds=None):
        pass

    masks = {"attention_mask", "completion_mask", "assistant_masks"}
    padding = KeepSideTensors(keeping_token_values(TRLCollator(pad_token_id=0)))
    assert columns_read_by(padding, forward) == {*masks, "input_ids", "position_ids", "seq_lengths"}
    assert columns_read_by(EncoderDecoderCollator(0), forward) >= masks
    assert not columns_read_by(KeepSideTensors(own), forward)


@pytest.mark.parametrize("label", [True, "positive"])
@pytest.mark.parametrize(
    "make",
    [
        DataCollatorForSeq2Seq,
        lambda tokenizer: keeping_token_values(DataCollatorWithPadding(tokenizer)),
        lambda tokenizer: StackOthers(DataCollatorWithPadding(tokenizer)),
    ],
    ids=["seq2seq", "padding", "default"],
)
def test_a_column_label_is_not_taken_for_the_labels(byte_level, make, label):
    collator = KeepSideTensors(make(byte_level()))
    expected = collator(ROWS)
    batch = collator([{**row, "label": label, "label_ids": label} for row in ROWS])
    assert batch.keys() == expected.keys()
    assert batch["labels"].tolist() == expected["labels"].tolist()


def test_a_collator_of_the_users_own_gets_the_column_label():
    seen = []
    KeepSideTensors(lambda rows: seen.extend(rows) or {})([{**row, "label": True} for row in ROWS])
    assert [row["label"] for row in seen] == [True, True]


def test_a_row_whose_columns_do_not_fit_is_refused_with_the_remedy(padding_collator):
    for row, reason in (
        ({"input_ids": [5, 6], "completion_mask": [1]}, "completion_mask is not as long as input_ids"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "no tokens"),
        ({"input_ids": [5, -6]}, "a negative token id in input_ids"),
        ({"input_ids": [5, 6], "labels": [-1, 6]}, "a negative label other than -100, which marks .* not trained on"),
    ):
        with pytest.raises(GKDDataError, match=rf"row 1 of a batch can't be used: {reason}\. Correct the dataset, or"):
            padding_collator([ROWS[0], row])


def test_an_encoder_reads_no_padding_of_the_rows():
    rows = [
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [7, 2, -100, -100]},
        {"input_ids": [0, 0, 8], "attention_mask": [0, 0, 1], "labels": [2, -100, -100, -100]},
    ]
    batch = EncoderDecoderCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[7, 2], [2, -100]]
    with pytest.raises(GKDDataError, match="got completion_mask: leave it out"):
        EncoderDecoderCollator(0)([{**rows[0], "completion_mask": [0, 1, 1]}])


def with_prompts(*prompts):
    return [{**row, PROMPT_IDS: prompt} for row, prompt in zip(ROWS, prompts, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["trl", "keeping labels", "seq2seq"])
def test_prompts_go_around_any_collator(byte_level, kind, side):
    tokenizer = byte_level()
    tokenizer.padding_side = side
    collators = {
        "trl": TRLCollator(pad_token_id=2),
        "keeping labels": keeping_token_values(DataCollatorWithPadding(tokenizer)),
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


def with_teacher_prompts(*prompts):
    return [{**row, TEACHER_PROMPT_IDS: prompt} for row, prompt in zip(ROWS, prompts, strict=True)]


def cut_at_the_front(rows):
    return TRLCollator(pad_token_id=0)([{"input_ids": row["input_ids"][-2:]} for row in rows])


@pytest.mark.parametrize(
    ("name", "collator"),
    [
        ("DataCollatorWithFlattening", DataCollatorWithFlattening()),
        ("DataCollatorForLanguageModeling", keeping_token_values(TRLCollator(pad_token_id=0, padding_free=True))),
        ("function", cut_at_the_front),
    ],
)
def test_a_collator_that_loses_the_teachers_prompts_is_refused_by_name(name, collator):
    with pytest.raises(GKDDataError, match=f"prompt of its own for each row .* {name} did not return the rows' tokens"):
        KeepSideTensors(collator)(with_teacher_prompts([], [9]))
    assert TEACHER_PROMPT_IDS not in KeepSideTensors(collator)(with_teacher_prompts([], []))


def test_prompts_of_the_teacher_that_a_collator_makes_itself_are_kept():
    def own(rows):
        return {**cut_at_the_front(rows), TEACHER_PROMPT_IDS: torch.tensor([[4], [4]])}

    assert KeepSideTensors(own)(with_teacher_prompts([8], [9]))[TEACHER_PROMPT_IDS].tolist() == [[4], [4]]


def test_side_tensors_go_with_rows_that_are_padded_on_the_left():
    row = {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], TEACHER_PROMPT_IDS: [9], ROW_KEY: 3}
    batch = KeepSideTensors(keeping_token_values(TRLCollator(pad_token_id=0)))([row])
    assert (batch[TEACHER_PROMPT_IDS].tolist(), batch[ROW_KEY].tolist()) == ([[9]], [3])


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
        "keeping labels": keeping_token_values(DataCollatorWithPadding(tokenizer)),
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


def test_collators_of_transformers_and_trl_only_pad_but_not_those_that_mask_or_derive_from_them(byte_level):
    tokenizer = byte_level()
    padding = [
        TRLCollator(pad_token_id=0),
        TRLCollator(pad_token_id=0, padding_free=True),
        DataCollatorWithPadding(tokenizer),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ]
    assert all(only_pads(each) and only_pads(KeepSideTensors(keeping_token_values(each))) for each in padding)

    class Own(TRLCollator):
        pass

    tokenizer.mask_token = "<mask>"
    masking = DataCollatorForLanguageModeling(tokenizer, mlm=True)
    assert not any(map(only_pads, [Own(pad_token_id=0), masking, EncoderDecoderCollator(0), list]))

"""Rows become tokens by the rules of the options, and batches are checked."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from gkd_trainer import GKDArguments, GKDConfigError, GKDDataError
from gkd_trainer.batch_keys import PROMPT_IDS, ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.data import unwrapped
from gkd_trainer.models.heads import Context
from gkd_trainer.trainer.pairing import OwnedContext
from gkd_trainer.trainer.preparation import (
    LongestRow,
    Preparation,
    PreparedOnce,
    is_stream,
    keeping_columns,
    longest_row,
    pad_token_id,
    refuse_negative_labels,
    require_labels,
    tokenizer_of,
)

X, STOP = -100, 2
PROMPT_ALONE = {"input_ids": [5, 6], "labels": [X, X]}
WITHOUT_PROMPT = {"input_ids": [5, STOP], "labels": [5, STOP]}
BOTH = {"input_ids": [5, 6, 7, STOP], "labels": [X, X, 7, STOP]}
SHORTER = OwnedContext("student", Context(16, has_rope=False))


def preparation(tokenizer=None, stop_ids=frozenset({STOP}), vocab_size=368, has_ranks=False, **options):
    rest = {name: options.pop(name, None) for name in ("formatting_func", "shorter")}
    extra = {
        name: options.pop(name)
        for name in ("packing", "eval_packing", "packing_strategy", "padding_free", "shuffle_dataset", "seed")
        if name in options
    }
    args = GKDArguments(**{"lmbda": 0.0, "max_length": 16, "max_new_tokens": 4, **options})
    for name, value in extra.items():  # of trl.SFTConfig
        setattr(args, name, value)
    return Preparation(args, tokenizer, stop_ids, vocab_size, has_ranks=has_ranks, **rest)


def prompt_of_length(length):
    return {"input_ids": [*range(5, 5 + length), STOP], "labels": [X] * length + [STOP]}


def ids_of(dataset):
    return [list(row["input_ids"]) for row in dataset]


def prepared(rows, is_training=False, **options):
    return ids_of(preparation(**options).prepared(Dataset.from_list(rows), "set", is_training=is_training))


def test_only_the_answer_of_a_conversation_is_trained_on(byte_level):
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    (row,) = preparation(tokenizer, frozenset({tokenizer.eos_token_id})).prepared(
        Dataset.from_list([{"messages": messages}]), "train", is_training=True
    )
    trained = [token_id for token_id in row["labels"] if token_id != X]
    assert tokenizer.decode(trained) == "fine<|im_end|>"
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\nhello<|im_end|>")


def test_a_row_that_formatting_func_made_is_taken(byte_level):
    tokenizer = byte_level()
    made = preparation(
        tokenizer,
        frozenset({tokenizer.eos_token_id}),
        formatting_func=lambda row: {"prompt": row["question"], "completion": row["answer"]},
    )
    (row,) = made.prepared(Dataset.from_list([{"question": "one", "answer": " two"}]), "train", is_training=True)
    assert tokenizer.decode([token_id for token_id in row["labels"] if token_id != X]) == " two<|im_end|>"


def test_a_completion_that_ends_with_a_stop_token_of_the_model_gets_no_second_one(byte_level):
    tokenizer = byte_level()
    rows = Dataset.from_list([{"prompt": "one", "completion": " two<|endoftext|>"}])
    eos, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    for stop_ids, expected in (({eos, other}, [other]), ({eos}, [other, eos])):
        (row,) = preparation(tokenizer, frozenset(stop_ids)).prepared(rows, "train", is_training=True)
        assert row["input_ids"][-len(expected) :] == expected
        assert row["input_ids"].count(eos) == len(expected) - 1


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"lmbda": 0.5, "seq_kd": True}, {"lmbda": 0.0, "seq_kd": True}])
def test_bare_prompts_are_trained_on_if_every_sample_is_generated(options):
    assert prepared([PROMPT_ALONE], is_training=True, **options) == [[5, 6]]


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_bare_prompts_are_evaluated_but_not_trained_on_off_policy(lmbda):
    assert prepared([PROMPT_ALONE, BOTH], is_training=True, lmbda=lmbda) == [BOTH["input_ids"]]
    assert prepared([PROMPT_ALONE, BOTH], lmbda=lmbda) == [[5, 6], BOTH["input_ids"]]


def test_rows_without_a_prompt_are_refused_only_if_all_completions_are_generated():
    with pytest.raises(GKDDataError, match=r"none of the 1 rows can be used: 1 no prompt, although lmbda=1\.0"):
        prepared([WITHOUT_PROMPT], is_training=True, lmbda=1.0)
    for is_training, lmbda in ((True, 0.5), (True, 0.0), (False, 1.0)):
        assert prepared([WITHOUT_PROMPT], is_training, lmbda=lmbda) == [[5, STOP]]


@pytest.mark.parametrize(
    ("options", "is_training", "leaves_room"),
    [
        ({"lmbda": 0.5}, True, True),
        ({"lmbda": 0.5}, False, True),
        ({"lmbda": 0.0}, True, False),
        ({"lmbda": 0.0}, False, False),
        ({"lmbda": 0.0, "eval_on_policy": True}, True, False),
        ({"lmbda": 0.0, "eval_on_policy": True}, False, True),
    ],
)
def test_a_prompt_leaves_room_for_a_generated_completion(options, is_training, leaves_room):
    rows = [prompt_of_length(12), prompt_of_length(13)]
    assert len(prepared(rows, is_training, **options)) == (1 if leaves_room else 2)


def test_a_label_beyond_the_vocabulary_is_refused():
    assert prepared([BOTH], vocab_size=8) == [BOTH["input_ids"]]
    with pytest.raises(GKDDataError):
        prepared([BOTH], vocab_size=7)


def test_without_max_length_a_row_beyond_the_shorter_context_is_refused():
    rows = [prompt_of_length(15), prompt_of_length(16)]
    assert len(prepared(rows[:1], max_length=None, shorter=SHORTER)) == 1
    with pytest.raises(GKDConfigError, match=r"^set: max_length=None .* needs 17 tokens, more than the student's"):
        prepared(rows, max_length=None, shorter=SHORTER)
    assert len(prepared(rows, max_length=None)) == 2
    # The context was compared with max_length at construction.
    assert len(prepared(rows[:1], max_length=16, shorter=OwnedContext("student", Context(3, has_rope=False)))) == 1


def test_without_max_length_generated_completions_count():
    rows = [prompt_of_length(13)]
    assert len(prepared(rows, is_training=True, max_length=None, shorter=SHORTER)) == 1
    with pytest.raises(GKDConfigError, match="needs 17 tokens with max_new_tokens"):
        prepared(rows, is_training=True, max_length=None, shorter=SHORTER, lmbda=0.5)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("has_ranks", [False, True])
def test_a_stream_is_evaluated_as_a_list_by_several_ranks_and_else_stays_one(has_ranks):
    made = preparation(has_ranks=has_ranks)
    evaluated = made.prepared(stream([BOTH, BOTH]), "eval")
    assert isinstance(evaluated, list) is has_ranks
    assert is_stream(made.prepared(stream([BOTH]), "train", is_training=True))
    assert is_stream(evaluated) is not has_ranks
    assert ids_of(evaluated) == [BOTH["input_ids"]] * 2
    assert isinstance(made.prepared(Dataset.from_list([BOTH]), "eval"), Dataset)


@pytest.mark.parametrize(
    ("options", "is_training", "rows"),
    [
        ({"packing": True}, True, 1),
        ({"packing": True}, False, 1),
        ({"packing": True, "eval_packing": False}, False, 2),
        ({"packing": True, "eval_packing": False}, True, 1),
        ({"packing": False, "eval_packing": True}, False, 1),
        ({"packing": False, "eval_packing": True}, True, 2),
    ],
)
def test_rows_are_packed_as_sfttrainers_options_say(options, is_training, rows):
    dataset = Dataset.from_list([{**BOTH, "note": "left out"}] * 2)
    made = preparation(packing_strategy="bfd", **options).prepared(dataset, "set", is_training=is_training)
    assert len(made) == rows
    if rows == 1:
        assert made[0]["input_ids"] == BOTH["input_ids"] * 2
        assert made[0]["labels"] == BOTH["labels"] * 2
        assert "note" not in made.column_names


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("is_training", [True, False])
def test_packing_keeps_the_tokens_beyond_max_length_if_its_strategy_splits_rows(strategy, is_training):
    row = {"input_ids": [*range(5, 45)], "labels": [*range(5, 45)]}
    made = preparation(packing=is_training, eval_packing=not is_training, packing_strategy=strategy)
    ids = ids_of(made.prepared(Dataset.from_list([row] * 2), "set", is_training=is_training))
    assert max(map(len, ids)) == 16
    assert sum(map(len, ids)) == (2 * 16 if strategy == "bfd" else 2 * 40)


def as_test_set(rows, **options):
    return ids_of(preparation(**options).prepared(Dataset.from_list(rows), "test", is_test=True))


@pytest.mark.parametrize(
    ("options", "leaves_room"), [({"lmbda": 0.5}, False), ({"lmbda": 0.0, "eval_on_policy": True}, True)]
)
def test_a_test_set_needs_room_only_for_completions_that_are_generated(options, leaves_room):
    rows = [prompt_of_length(12), prompt_of_length(13)]
    if not leaves_room:
        assert as_test_set(rows, **options) == [row["input_ids"] for row in rows]
        rows = [PROMPT_ALONE, {"input_ids": [*range(5, 18)], "labels": [X] * 13}]  # completed greedily
    with pytest.raises(GKDDataError, match=r"^test: .*1 prompt longer than max_length - .*\(row 1, from 0\)"):
        as_test_set(rows, **options)


def test_a_test_set_keeps_its_rows_in_order_without_packing():
    rows = [prompt_of_length(length) for length in range(1, 9)]
    options = {"packing": True, "packing_strategy": "wrapped", "shuffle_dataset": True, "seed": 3}
    assert as_test_set(rows, **options) == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_are_shuffled_as_sfttrainers_option_says(is_streamed):
    rows = Dataset.from_list([prompt_of_length(length) for length in range(1, 9)])
    kept = ids_of(rows)
    rows = rows.to_iterable_dataset() if is_streamed else rows
    made = {shuffles: preparation(shuffle_dataset=shuffles, seed=3) for shuffles in (False, True)}
    assert ids_of(made[False].prepared(rows, "train", is_training=True)) == kept
    assert ids_of(made[True].prepared(rows, "train", is_training=True)) == ids_of(rows.shuffle(seed=3)) != kept


def test_rows_are_shuffled_before_they_are_packed_too():
    rows = Dataset.from_list([prompt_of_length(length) for length in (1, 2, 3, 4, 5, 6)])
    options = {"packing": True, "packing_strategy": "wrapped", "seed": 3}
    plain, shuffled = (
        ids_of(preparation(shuffle_dataset=is_on, **options).prepared(rows, "train", is_training=True))
        for is_on in (False, True)
    )
    assert sum(map(len, plain)) == sum(map(len, shuffled))
    assert sorted(plain) != sorted(shuffled)


def test_the_longest_row_counts_its_tokens_and_the_prompts_that_are_completed():
    rows = Dataset.from_list([prompt_of_length(9), BOTH, PROMPT_ALONE])
    assert longest_row(rows, 20, is_generating=False) == LongestRow(10, 22)
    assert longest_row(rows, 20, is_generating=True) == LongestRow(10, 29)
    assert longest_row(rows.select([0, 1]), 20, is_generating=False) == LongestRow(10, 0)
    assert longest_row(rows.select([]), 20, is_generating=True) == LongestRow(0, 0)


def test_a_samples_own_prompt_replaces_the_tokens_before_the_answer():
    rows = Dataset.from_list([{**BOTH, PROMPT_IDS: [5, 6, 8, 9, 10]}, {**BOTH, PROMPT_IDS: []}])
    assert longest_row(rows, 20, is_generating=True) == LongestRow(4, 25)
    assert longest_row(rows.select([1]), 20, is_generating=True) == LongestRow(4, 22)


def test_rows_without_labels_are_all_trained_on_and_have_no_prompt():
    rows = Dataset.from_list([{"input_ids": [5, 6, 7]}])
    assert longest_row(rows, 20, is_generating=False) == LongestRow(3, 0)


@pytest.mark.parametrize(
    ("longest", "said"),
    [
        (LongestRow(17, 0), "needs 17 tokens, more than the student's context, 16 tokens"),
        (LongestRow(16, 17), "needs 17 tokens with max_new_tokens, more"),
        (LongestRow(18, 17), "needs 18 tokens, more"),
        (LongestRow(16, 16), None),
    ],
)
def test_rows_beyond_a_context_are_refused_by_the_longest(longest, said):
    if said is None:
        longest.refuse_beyond(SHORTER, "train")
        return
    with pytest.raises(GKDConfigError, match=f"^train: .*{said}"):
        longest.refuse_beyond(SHORTER, "train")


def test_a_collator_keeps_labels_and_the_side_tensors_of_rows_and_is_wrapped_once(byte_level):
    padding = DataCollatorWithPadding(byte_level())
    kept = keeping_columns(padding)
    assert unwrapped(kept) is padding
    assert keeping_columns(kept) is kept
    batch = kept([{**BOTH, PROMPT_IDS: [5, 6, 8], ROW_KEY: 9}, {**WITHOUT_PROMPT, PROMPT_IDS: [], ROW_KEY: 4}])
    assert batch["labels"].tolist() == [[X, X, 7, STOP], [5, STOP, X, X]]
    assert batch[PROMPT_IDS].tolist() == [[5, 6, 8], [X, X, X]]
    assert batch[ROW_KEY].tolist() == [9, 4]


def test_the_keys_of_rows_that_are_packed_are_dropped_with_a_warning(caplog):
    rows = Dataset.from_list([{**BOTH, ROW_KEY: number} for number in range(2)])
    for packing, warnings in ((False, 0), (True, 1)):
        made = preparation(packing=packing, packing_strategy="bfd").prepared(rows, "train", is_training=True)
        assert (ROW_KEY in made.column_names) is not packing
        assert caplog.text.count(f"train: packing joins rows, so the column {ROW_KEY}") == warnings


@pytest.mark.parametrize("has_ranks", [False, True])
def test_a_stream_is_packed_for_evaluation_on_any_number_of_ranks(has_ranks):
    made = preparation(packing=True, packing_strategy="bfd", has_ranks=has_ranks)
    [row] = made.prepared(stream([BOTH, BOTH]), "eval")
    assert list(row["input_ids"]) == BOTH["input_ids"] * 2


def test_rows_that_can_not_be_packed_are_refused():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return [BOTH][index]

    with pytest.raises(GKDConfigError, match=r"set: packing joins the rows of a datasets\.Dataset.*got Rows: convert"):
        preparation(packing=True, packing_strategy="bfd").prepared(Rows(), "set")


def test_a_batch_without_labels_is_refused_with_what_it_holds():
    require_labels({"labels": torch.zeros(1, 2)})
    for inputs in ({"input_ids": 1, "attention_mask": 2}, {"input_ids": 1, "attention_mask": 2, "labels": None}):
        with pytest.raises(GKDDataError, match="returned no labels, only attention_mask, input_ids"):
            require_labels(inputs)


def test_a_batch_with_a_negative_label_other_than_the_ignored_one_is_refused():
    refuse_negative_labels({"labels": torch.tensor([[X, 0, 5]])})
    with pytest.raises(GKDDataError, match=r"returned a negative label other than -100, .*: -1\. Put -100"):
        refuse_negative_labels({"labels": torch.tensor([[X, -1, 5]])})


def test_the_tokenizer_is_found_also_within_a_processor():
    tokenizer = SimpleNamespace(pad_token_id=7)
    assert tokenizer_of(tokenizer) is tokenizer
    assert tokenizer_of(SimpleNamespace(tokenizer=tokenizer)) is tokenizer
    assert tokenizer_of(None) is None


def test_a_tokenizer_that_holds_another_is_not_taken_for_a_processor(byte_level):
    """As tokenizers in code from the hub do."""
    tokenizer = byte_level()
    tokenizer.tokenizer = object()
    assert tokenizer_of(tokenizer) is tokenizer


def test_mistral_commons_tokenizer_is_refused_also_within_a_processor():
    class MistralCommonBackend(PreTrainedTokenizerBase):
        def __init__(self):
            self.tokenizer = object()

    for given in (MistralCommonBackend(), SimpleNamespace(tokenizer=MistralCommonBackend())):
        with pytest.raises(GKDConfigError, match="got MistralCommonBackend"):
            tokenizer_of(given)


@pytest.mark.parametrize(
    ("processing_class", "expected"),
    [
        (SimpleNamespace(pad_token_id=7, eos_token_id=2), 7),
        (SimpleNamespace(pad_token_id=0, eos_token_id=2), 0),
        (SimpleNamespace(pad_token_id=None, eos_token_id=2), 2),
        (SimpleNamespace(pad_token_id=None, eos_token_id=None), 0),
        (SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=7), pad_token_id=1), 7),
        (None, 0),
    ],
)
def test_batches_are_filled_with_the_pad_token_or_eos_or_zero(processing_class, expected):
    assert pad_token_id(processing_class) == expected


def test_iterable_datasets_are_streams():
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([BOTH])

    assert is_stream(Rows())
    assert is_stream(stream([BOTH]))
    assert not is_stream(Dataset.from_list([BOTH]))
    assert not is_stream([BOTH])


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_joining_rows_with_prompts_for_the_teacher_is_refused(option):
    rows = Dataset.from_list([{**BOTH, TEACHER_PROMPT_IDS: [8, 9]}])
    message = f"{option} joins rows, so the teacher can't read a prompt of its own for each: set {option}=False"
    with pytest.raises(GKDConfigError, match=message):
        preparation(packing_strategy="bfd", **{option: True}).prepared(rows, "train", is_training=True)


def test_a_dataset_is_prepared_once_for_each_name_and_use():
    seen = []

    def prepare(dataset, name, *, is_training, is_drawn):
        assert is_drawn == is_training
        seen.append((name, is_training))
        return [*dataset, name]

    prepared_once = PreparedOnce(prepare)

    def once(dataset, name, *, is_training=False):
        return prepared_once(dataset, name, is_training=is_training, is_drawn=is_training)

    assert once(None, "eval") is None
    train, test = once([], "train", is_training=True), once({"train": [], "b": []}, "eval")
    assert seen == [("train", True), ("train", False), ("b", False)]
    assert once(train, "train", is_training=True) is train
    assert once(test, "eval") == test
    assert len(seen) == 3
    assert once({**test, "b": ["new"]}, "eval") == {"train": ["train"], "b": ["new", "b"]}
    assert once(["new"], "train", is_training=True) == ["new", "train"]
    assert seen[3:] == [("b", False), ("train", True)]

"""Datasets: every kind becomes ids and labels, and dropped rows are counted."""

import logging

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, List, Value
from filelock import FileLock, Timeout
from PIL import Image

from gkd_trainer.batch_keys import PROMPT_IDS, ROW_KEY
from gkd_trainer.data import map_cache, prepare_dataset
from gkd_trainer.data.rendered_prompts import RenderedPrompts
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.errors import GKDDataError
from tests.data.templates import CHATS

REWRITING = (
    "{% for m in messages %}{{ m.role + ('' if m.role == 'assistant' and not loop.last else m.content) }}{% endfor %}"
)


def conversation(answer, question="hello there"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


LONG_QUESTION = "one two three four five six seven eight nine ten " * 4
ROWS = [
    conversation("Paris."),
    conversation("I am fine"),
    conversation(""),
    conversation("never read", LONG_QUESTION),
    conversation("two"),
    conversation("also never read", LONG_QUESTION),
]


@pytest.fixture
def mixing(rules):
    """Rules of a run with 0 < lmbda < 1 in which the long question does not fit."""
    return rules(max_length=48, is_generating=True)


def generate(rows):
    yield from rows


def iterable(rows):
    return IterableDataset.from_generator(generate, gen_kwargs={"rows": rows})


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "gkd_trainer.data.prepare"]


def test_dropped_rows_are_counted_by_reason_in_one_line(byte_level, mixing, caplog):
    prepared = prepare_dataset(Dataset.from_list(ROWS), byte_level(), mixing, name="eval")
    assert [messages[1]["content"] for messages in prepared["messages"]] == ["Paris.", "I am fine", "two"]
    assert warnings_of(caplog) == [
        "eval: 3 of 6 rows dropped: 2 prompt longer than max_length - max_new_tokens (48 - 8), 1 empty completion"
    ]


def test_rows_that_can_not_be_used_are_named_where_all_are_needed(byte_level, mixing):
    expected = r"test: expected that each row can be used, .*; got 2 prompt longer .*, 1 empty completion \(row 2, 3, 5"
    with pytest.raises(GKDDataError, match=expected):
        prepare_dataset(ROWS, byte_level(), mixing, name="test", needs_all=True)
    assert len(prepare_dataset(ROWS[:2], byte_level(), mixing, needs_all=True)) == 2
    for source in (iterable(ROWS), Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2)):
        streamed = prepare_dataset(source, byte_level(), mixing, name="test", needs_all=True)
        for _ in range(2):
            with pytest.raises(
                GKDDataError, match=r"test: .*; got empty completion \(row 2, from 0\): correct or remove"
            ):
                list(streamed)


TWO_ANSWERS = {"messages": [*conversation("one")["messages"], {"role": "assistant", "content": "two"}]}


@pytest.mark.parametrize("kind", [Dataset.from_list, iterable], ids=["map-style", "iterable"])
def test_a_row_whose_turns_are_not_found_leaves_the_others_in_the_set(chat_tokenizer, rules, kind, caplog):
    rows = [TWO_ANSWERS, conversation("Paris."), TWO_ANSWERS, conversation("three")]
    prepared = list(prepare_dataset(kind(rows), chat_tokenizer(CHATS["olmo2"]), rules()))
    assert [row["messages"][1]["content"] for row in prepared] == ["Paris.", "three"]
    n_dropped = "1 row dropped so far:" if kind is iterable else "2 of 4 rows dropped: 2"
    assert warnings_of(caplog) == [
        f"train: {n_dropped} assistant turns can't be found without {{% generation %}} markers in the chat template"
    ]


def test_a_set_of_rows_whose_turns_are_not_found_is_refused_with_the_remedy(chat_tokenizer, rules):
    with pytest.raises(GKDDataError, match=r"none of the 2 rows can be used: 2 assistant turns .* markers"):
        prepare_dataset([TWO_ANSWERS] * 2, chat_tokenizer(CHATS["olmo2"]), rules())


@pytest.fixture
def saved(tmp_path):
    Dataset.from_list([conversation("Paris.")]).save_to_disk(tmp_path)
    return lambda: Dataset.load_from_disk(tmp_path)


def test_rows_prepared_by_other_code_are_not_read_from_the_cache_of_datasets(byte_level, rules, saved, monkeypatch):
    def cached_file():
        return prepare_dataset(saved(), byte_level(), rules()).cache_files

    before = cached_file()
    assert cached_file() == before
    monkeypatch.setattr(map_cache, "__version__", "0.0.9")
    map_cache.code_version.cache_clear()
    assert cached_file() != before
    map_cache.code_version.cache_clear()


def test_rows_in_files_are_prepared_under_a_lock(byte_level, rules, saved, tmp_path):
    def formatted(row):
        for file in tmp_path.glob("gkd-*.lock"):
            with pytest.raises(Timeout):
                FileLock(file).acquire(timeout=0)
            (tmp_path / "tried").touch()
        return row["messages"]

    assert len(prepare_dataset(saved(), byte_level(), rules(), formatting_func=formatted)) == 1
    assert (tmp_path / "tried").exists()


IN_PARTS = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}, *conversation("two")["messages"][1:]]
}


def test_answers_that_are_json_are_trained_on_as_they_are_beside_contents_in_parts(byte_level, rules, caplog):
    tokenizer = byte_level()
    answers = ["4", '{"a":1,   "b":2.0}', '"Paris"', "true"]
    prepared = prepare_dataset([IN_PARTS, *map(conversation, answers)], tokenizer, rules())
    for row, answer in zip(prepared, ["two", *answers], strict=True):
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == f"{answer}<|im_end|>"
    assert [row["messages"][1]["content"] for row in prepared] == ["two", *answers]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("is_stream", [False, True])
def test_texts_that_datasets_may_have_parsed_are_warned_of(byte_level, rules, is_stream, caplog):
    rows = Dataset.from_list([IN_PARTS, conversation("two")], on_mixed_types="use_json")
    prepared = prepare_dataset(rows.to_iterable_dataset() if is_stream else rows, byte_level(), rules())
    [warning] = warnings_of(caplog)
    assert warning.startswith("train: messages[].content holds texts beside values of other types, so `datasets` has")
    caplog.clear()
    prepare_dataset(prepared, byte_level(), rules())
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", [None, "torch", "numpy", "pandas", "arrow"])
def test_rows_of_a_dataset_in_any_format_are_read_alike(byte_level, rules, kind):
    rows = Dataset.from_list([{**conversation("Paris."), "id": 7}, {**conversation(""), "id": 8}])
    expected = prepare_dataset(rows, byte_level(), rules())
    prepared = prepare_dataset(rows.with_format(kind), byte_level(), rules())
    assert prepared.with_format(None)[:] == expected[:]
    assert prepared.format["type"] == (None if kind in ("pandas", "arrow") else kind)
    assert list(prepared[0]["labels"]) == expected[0]["labels"]


def test_columns_that_a_format_hides_stay_hidden_but_for_the_tokens(rules):
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2], "id": 7}])
    prepared = prepare_dataset(rows.with_format("torch", columns=["input_ids"]), None, rules())
    assert {name: value.tolist() for name, value in prepared[0].items()} == {"input_ids": [1, 2], "labels": [-100, 2]}
    assert prepared.with_format(None)[0] == {"input_ids": [1, 2], "labels": [-100, 2], "id": 7}


def test_nothing_is_logged_if_nothing_is_dropped(byte_level, mixing, caplog):
    prepare_dataset(ROWS[:2], byte_level(), mixing)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", [Dataset.from_list, iterable], ids=["map-style", "iterable"])
def test_turns_without_a_stop_token_are_logged_once_with_the_remedy(byte_level, rules, kind, caplog):
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    rows = [conversation("Paris."), conversation("two"), conversation("three")]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(list(prepare_dataset(kind(rows), tokenizer, rules()))) == 3
    [warning] = warnings_of(caplog)
    if kind is iterable:
        assert warning.startswith("train: last assistant turns end with '<|im_end|>', at which generation does not end")
    else:
        assert warning.startswith("train: in 3 of 3 rows the last assistant turn ends with '<|im_end|>', at which")
    assert warning.endswith(f"add its id, {end}, to eos_token_id in the student's generation_config")
    caplog.clear()
    list(prepare_dataset(kind(rows), tokenizer, rules(stop_ids=frozenset({end}))))
    assert warnings_of(caplog) == []


def test_other_columns_are_kept_and_only_prompts_are_added(byte_level, rules, mixing):
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    prepared = prepare_dataset(Dataset.from_list(rows), byte_level(), mixing)
    assert sorted(prepared.column_names) == ["id", "input_ids", "labels", "messages", PROMPT_IDS]
    assert prepared["id"][:] == [0, 1, 4]
    assert prepared["messages"][0] == ROWS[0]["messages"]
    off_policy = prepare_dataset(Dataset.from_list(rows), byte_level(), rules())
    assert sorted(off_policy.column_names) == ["id", "input_ids", "labels", "messages"]


def keyed(*keys):
    return [{**row, ROW_KEY: key} for row, key in zip(ROWS, keys, strict=False)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list, iterable])
def test_rows_keep_their_keys_when_others_are_dropped(byte_level, mixing, kind):
    prepared = prepare_dataset(kind(keyed(10, 11, 12, 13, 14, 15)), byte_level(), mixing)
    assert [row[ROW_KEY] for row in prepared] == [10, 11, 14]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_keep_their_keys_whatever_formatting_func_returns(byte_level, rules, num_proc):
    rows = [{"question": "hello", ROW_KEY: key} for key in (7, 8, 9)]

    def formatted(row):
        return None if row[ROW_KEY] == 8 else f"{row['question']} there"

    prepared = prepare_dataset(
        Dataset.from_list(rows), byte_level(), rules(), formatting_func=formatted, num_proc=num_proc
    )
    assert prepared[ROW_KEY][:] == [7, 9]


def test_keys_of_any_width_become_int64(byte_level, rules):
    dataset = Dataset.from_list(keyed(1, 2)).cast_column(ROW_KEY, Value("uint8"))
    prepared = prepare_dataset(dataset, byte_level(), rules())
    assert prepared.features[ROW_KEY] == Value("int64")
    assert prepared[ROW_KEY][:] == [1, 2]


@pytest.mark.parametrize("value", ["b", None])
@pytest.mark.parametrize("kind", [list, iterable])
def test_a_key_that_is_not_an_integer_is_refused_with_its_row_also_in_a_stream(byte_level, rules, kind, value):
    rows = [*keyed(10, 11), {**ROWS[4], ROW_KEY: value}]
    with pytest.raises(GKDDataError, match="eval: row 2: expected a 64-bit integer as row_key"):
        list(prepare_dataset(kind(rows), byte_level(), rules(), name="eval"))


def test_no_row_left_is_an_error_that_says_what_would_help(byte_level, rules):
    tokenizer = byte_level()
    with pytest.raises(GKDDataError) as error:
        prepare_dataset(ROWS[2:4], tokenizer, rules(max_length=20, is_generating=True, max_new_tokens=8))
    prompt = tokenizer.apply_chat_template(ROWS[3]["messages"][:1], add_generation_prompt=True)["input_ids"]
    assert str(error.value) == (
        "train: none of the 2 rows can be used: 1 empty completion, "
        "1 prompt longer than max_length - max_new_tokens (20 - 8). "
        f"The shortest prompt has {len(prompt)} tokens: set max_length to {len(prompt) + 8} or more"
    )
    long_enough = rules(max_length=len(prompt) + 8, is_generating=True, max_new_tokens=8)
    assert len(prepare_dataset(ROWS[2:4], tokenizer, long_enough)) == 1


def test_the_suggested_length_suffices_if_nothing_is_generated(rules):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}]
    with pytest.raises(GKDDataError, match=r"no trained token within max_length \(2\). Set max_length to 3"):
        prepare_dataset(rows, None, rules(max_length=2))
    assert len(prepare_dataset(rows, None, rules(max_length=3))) == 1


def test_an_empty_dataset_is_an_error(byte_level, rules):
    for dataset in ([], Dataset.from_list([]), iterable([])):
        with pytest.raises(GKDDataError, match="at least one row"):
            prepare_dataset(dataset, byte_level(), rules())


def test_an_iterable_dataset_gives_what_a_map_style_one_gives(byte_level, mixing):
    mapped = prepare_dataset(ROWS, byte_level(), mixing)
    for source in (iterable(ROWS), Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2)):
        streamed = prepare_dataset(source, byte_level(), mixing)
        assert isinstance(streamed, IterableDataset)
        assert list(streamed) == list(mapped)
        assert list(streamed) == list(mapped)


def test_an_iterable_dataset_says_at_powers_of_ten_why_rows_are_dropped(byte_level, mixing, caplog):
    streamed = prepare_dataset(iterable([ROWS[0], *[ROWS[2]] * 12, ROWS[3]]), byte_level(), mixing)
    assert len(list(streamed)) == 1
    assert warnings_of(caplog) == [
        "train: 1 row dropped so far: empty completion",
        "train: 10 rows dropped so far: empty completion",
        "train: 1 row dropped so far: prompt longer than max_length - max_new_tokens (48 - 8)",
    ]


def test_an_iterable_dataset_refuses_a_format_before_the_run(byte_level, rules):
    with pytest.raises(GKDDataError, match="seq_kd=True"):
        prepare_dataset(iterable([{"prompt": "hello"}]), byte_level(), rules())
    two_turns = [{"messages": ROWS[0]["messages"] * 2}]
    with pytest.raises(GKDDataError, match="preserves prefixes"):
        prepare_dataset(iterable(two_turns), byte_level(REWRITING), rules())


def test_an_iterable_dataset_raises_nothing_in_the_middle_of_a_run(byte_level, on_policy, caplog):
    rows = [{"prompt": "hello", "text": None}, {"prompt": None, "text": "hello"}]
    streamed = prepare_dataset(iterable(rows), byte_level(), on_policy())
    assert len(list(streamed)) == 1
    assert "expected a prompt in each row" in warnings_of(caplog)[0]


def test_rows_without_a_prompt_are_counted_if_some_are_generated(byte_level, rules, caplog):
    rows = [{"text": "hello"}, {"text": "one two"}]
    assert len(prepare_dataset(rows, byte_level(), rules())) == 2
    assert warnings_of(caplog) == []
    list(prepare_dataset(iterable(rows), byte_level(), rules(is_generating=True)))
    assert len(prepare_dataset(rows, byte_level(), rules(is_generating=True))) == 2
    assert warnings_of(caplog) == [
        "train: rows without a prompt (trained on from the first token) stay off-policy",
        "train: 2 of 2 rows have no prompt (they are trained on from the first token) and stay off-policy",
    ]


def test_two_processes_give_what_one_gives(byte_level, mixing, caplog):
    alone = prepare_dataset(Dataset.from_list(ROWS), byte_level(), mixing)
    log_alone = warnings_of(caplog)
    caplog.clear()
    together = prepare_dataset(Dataset.from_list(ROWS), byte_level(), mixing, num_proc=2)
    assert list(together) == list(alone)
    assert warnings_of(caplog) == log_alone


def test_a_format_is_refused_from_another_process_too(byte_level, rules):
    with pytest.raises(GKDDataError, match="seq_kd=True"):
        prepare_dataset([{"prompt": "hello"}] * 4, byte_level(), rules(), num_proc=2)


def test_more_processes_than_rows_do_no_harm(byte_level, mixing):
    assert len(prepare_dataset(ROWS[:2], byte_level(), mixing, num_proc=8)) == 2


def test_the_same_rows_and_rules_are_found_in_the_cache(byte_level, mixing, tmp_path, caplog):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    dataset = Dataset.load_from_disk(tmp_path / "rows")
    tokenizer = byte_level()

    def fingerprint(rules, formatting_func=None):
        return prepare_dataset(dataset, tokenizer, rules, formatting_func=formatting_func)._fingerprint

    with caplog.at_level(logging.WARNING, logger="datasets"):
        first = fingerprint(mixing)
        assert fingerprint(mixing) == first
        assert fingerprint(mixing, lambda row: row["messages"]) != first
    assert not [record for record in caplog.records if record.name.startswith("datasets")]


@pytest.mark.parametrize("make", [Dataset.from_list, iterable])
@pytest.mark.parametrize(
    ("formatting_func", "equivalent"),
    [
        (lambda row: row["q"] + row["a"], {"text": "hello Paris"}),
        (
            lambda row: [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}],
            conversation(" Paris", "hello"),
        ),
        (
            lambda row: {"prompt": row["q"], "completion": row["a"]},
            {"prompt": "hello", "completion": " Paris"},
        ),
        (lambda row: {"input_ids": [1, 2]}, {"input_ids": [1, 2]}),
    ],
    ids=["text", "messages", "prompt and completion", "tokens"],
)
def test_a_formatting_func_may_give_any_format(byte_level, rules, make, formatting_func, equivalent):
    rows = [{"q": "hello", "a": " Paris"}]
    [prepared] = prepare_dataset(make(rows), byte_level(), rules(), formatting_func=formatting_func)
    [expected] = prepare_dataset([equivalent], byte_level(), rules())
    assert prepared == {**rows[0], "input_ids": expected["input_ids"], "labels": expected["labels"]}


def test_what_a_formatting_func_must_not_give_is_named(byte_level, rules):
    with pytest.raises(GKDDataError, match="it returned int"):
        prepare_dataset([{"q": "hello"}], byte_level(), rules(), formatting_func=lambda row: 3)
    with pytest.raises(GKDDataError, match="1 formatting_func returned None"):
        prepare_dataset([{"q": "hello"}], byte_level(), rules(), formatting_func=lambda row: None)


def test_a_list_of_rows_in_several_formats_is_prepared(byte_level, rules, caplog):
    rows = [
        conversation("Paris."),
        {"text": "hello"},
        {"prompt": "one", "completion": " two"},
        {"prompt": [{"role": "user", "content": "hello"}], "completion": "fine"},
        {"input_ids": [1, 2]},
    ]
    prepared = prepare_dataset(rows, byte_level(), rules())
    assert len(prepared) == len(rows)
    assert warnings_of(caplog) == []
    assert [row["labels"] for row in prepared] == [
        prepare_dataset([row], byte_level(), rules())[0]["labels"] for row in rows
    ]


def test_a_reason_that_first_occurs_late_is_counted(rules, caplog):
    usable = {"input_ids": [1, 2], "labels": [-100, 2]}
    rows = [usable] * 1500 + [{"input_ids": [], "labels": []}]
    assert len(prepare_dataset(rows, None, rules())) == 1500
    assert warnings_of(caplog) == ["train: 1 of 1501 rows dropped: 1 no tokens"]


def test_the_column_types_do_not_depend_on_which_rows_are_usable(byte_level, rules):
    late = prepare_dataset([{"text": ""}] * 1500 + [{"text": "hello"}], byte_level(), rules())
    alone = prepare_dataset([{"text": "hello"}], byte_level(), rules())
    assert late[:] == alone[:]
    assert late.features == alone.features
    assert late.features["input_ids"] == late.features["labels"] == List(Value("int32"))


def test_a_dataset_in_torch_format_stays_one(rules):
    dataset = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]).with_format("torch")
    prepared = prepare_dataset(dataset, None, rules(max_length=2))
    assert torch.equal(prepared[0]["input_ids"], torch.tensor([1, 2]))
    assert prepared[0]["input_ids"].dtype == torch.int64


class TorchDataset(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TorchStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"input_ids": [1, 2]}


def test_other_datasets_of_tokenised_rows_pass_untouched(rules):
    for dataset in (TorchDataset([{"input_ids": [1, 2]}]), TorchStream()):
        assert prepare_dataset(dataset, None, rules()) is dataset


def test_other_datasets_of_other_rows_are_refused(byte_level, rules):
    for dataset in (TorchDataset([conversation("Paris.")]), TorchDataset([]), (row for row in ROWS), 3):
        with pytest.raises(GKDDataError, match=r"convert it with datasets\.Dataset\.from_list"):
            prepare_dataset(dataset, byte_level(), rules())


def test_a_dict_of_splits_is_refused(byte_level, rules):
    with pytest.raises(GKDDataError, match=r"got DatasetDict.*pick one of its splits"):
        prepare_dataset(DatasetDict(train=Dataset.from_list(ROWS)), byte_level(), rules())


def test_a_list_of_anything_but_dicts_is_refused(byte_level, rules):
    with pytest.raises(GKDDataError, match=r"expected a list of dicts.*it holds str"):
        prepare_dataset(["hello"], byte_level(), rules())


DATED = (
    "{{ date_string or strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
)
DATE = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("row", "is_warned"),
    [
        (conversation("Paris."), True),
        ({**conversation("Paris."), **DATE}, False),
        # Filled in by Arrow for the key of another row; an option of rendering, which is ignored.
        ({**conversation("Paris."), "chat_template_kwargs": {"date_string": None}}, True),
        ({**conversation("Paris."), "chat_template_kwargs": {"tokenize": False}}, True),
        ({"text": "one two"}, False),
        ({**conversation("Paris."), "input_ids": [5, 6]}, False),
    ],
)
def test_a_template_that_writes_todays_date_is_warned_of_once(byte_level, rules, caplog, row, is_warned, is_stream):
    rows = [row, row]
    prepare_dataset(iterable(rows) if is_stream else rows, byte_level(DATED), rules(train_on="last_turn"), name="eval")
    assert [message[:50] for message in warnings_of(caplog)] == [
        "eval: the chat template writes today's date, so to"
    ] * is_warned


OWN_PROMPT = {"teacher_prompt": [{"role": "user", "content": "one"}]}


@pytest.mark.parametrize(
    ("row", "has_other_tokens", "is_warned"),
    [
        ({**conversation("Paris."), **OWN_PROMPT}, False, True),
        ({**conversation("Paris."), **OWN_PROMPT, **DATE}, False, False),
        ({**conversation("Paris."), "teacher_prompt": "one"}, False, False),
        (conversation("Paris."), False, False),
        (conversation("Paris."), True, True),
        ({**conversation("Paris."), **DATE}, True, False),
        ({"text": "one two"}, True, False),
    ],
)
def test_a_teachers_template_that_writes_todays_date_is_warned_of(
    byte_level, rules, caplog, row, has_other_tokens, is_warned
):
    teacher = byte_level(DATED)
    prompts = TeacherPrompts(teacher, rendered=RenderedPrompts(teacher) if has_other_tokens else None)
    prepare_dataset([row], byte_level(), rules(train_on="last_turn"), name="eval", teacher_prompts=prompts)
    assert [message[:74] for message in warnings_of(caplog)] == [
        "eval: the chat template writes today's date into the teacher's prompts, so"
    ] * is_warned


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_that_trl_packed_get_the_positions_of_their_samples_as_they_are_cut(rules, is_stream):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [5, 6], "labels": [-100, -100], "seq_lengths": [2]},
        {"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": None},
    ]
    data = Dataset.from_list(rows)
    prepared = [*prepare_dataset(data.to_iterable_dataset() if is_stream else data, None, rules(max_length=4))]
    assert [row["position_ids"] for row in prepared] == [[0, 1, 2, 0], None]
    assert [row["seq_lengths"] for row in prepared] == [[3, 1], None]


LONG = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}


def test_rows_that_are_cut_are_counted_in_one_line(rules, caplog):
    short = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    prepare_dataset([LONG, short, LONG], None, rules(max_length=3), name="eval")
    prepare_dataset([LONG, short], None, rules())
    assert warnings_of(caplog) == ["eval: 2 of 3 rows cut to max_length=3"]


def test_a_stream_says_once_that_rows_are_cut(rules, caplog):
    [*prepare_dataset(iterable([LONG] * 3), None, rules(max_length=3), name="eval")]
    assert warnings_of(caplog) == ["eval: rows longer than max_length=3 are cut"]


def test_a_row_whose_completion_is_always_generated_does_not_count_as_cut(on_policy, caplog):
    prepare_dataset([LONG], None, on_policy(max_length=4, max_new_tokens=3))
    assert warnings_of(caplog) == []


def test_the_labels_of_an_encoder_decoder_count_as_cut(rules, caplog):
    rows = [{"input_ids": [5, 6], "labels": [5, 6, 7]}]
    prepare_dataset(rows, None, rules(max_length=2, is_encoder_decoder=True), name="eval")
    assert warnings_of(caplog) == ["eval: 1 of 1 rows cut to max_length=2"]


def test_a_transform_runs_once_and_not_over_the_prepared_rows(rules):
    def transformed(batch):
        ids = [[5, 6, 7, len(text), 0] for text in batch["text"]]
        return {"input_ids": ids, "attention_mask": [[1, 1, 1, 1, 0]] * len(ids), ROW_KEY: range(len(ids))}

    rows = Dataset.from_list([{"text": "one"}, {"text": "three"}]).with_transform(transformed)
    prepared = prepare_dataset(rows, None, rules(max_length=4))
    assert prepared.format["type"] is None
    assert prepared[1] == {
        "input_ids": [5, 6, 7, 5],
        "labels": [5, 6, 7, 5],
        "attention_mask": [1, 1, 1, 1],
        ROW_KEY: 0,  # the transform gets one row at a time
    }


@pytest.mark.parametrize("column", ["messages", "other"])
def test_a_transform_may_replace_and_make_the_columns_that_are_read(byte_level, rules, column):
    rows = Dataset.from_list([{column: conversation("Paris.")["messages"], "others": 1}])
    rows.set_transform(lambda batch: {"messages": [conversation("two")["messages"] for _ in batch["others"]]})
    [row] = prepare_dataset(rows, byte_level(), rules())
    assert byte_level().decode(row["input_ids"]).endswith("two<|im_end|>\n")
    assert row.keys() == {"messages", "input_ids", "labels"}


def test_images_that_a_transform_makes_stay_images(rules):
    rows = Dataset.from_list([{"input_ids": [5, 6], "size": 3}])
    rows = rows.with_transform(
        lambda batch: {"input_ids": batch["input_ids"], "pictures": [Image.new("RGB", (n, n)) for n in batch["size"]]}
    )
    [row] = prepare_dataset(rows, None, rules())
    assert row["pictures"].size == (3, 3)

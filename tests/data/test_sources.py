"""Rows by name: paths are taken literally, files have one split, and broken lines are named."""

import json

import datasets
import pytest

from gkd_trainer.data.gsm8k import INSTRUCTION
from gkd_trainer.data.sources import RowSource, in_format, naming_broken_lines
from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.measuring import usable_rows

ROWS = [{"prompt": str(number)} for number in range(10)]
STREAMED = pytest.mark.parametrize("is_streaming", [False, True])


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path, split="train", **options):
    return RowSource("dataset", str(path), split, **options)


def prompts(rows):
    return [row["prompt"] for row in rows]


@STREAMED
@pytest.mark.parametrize("name", ["x?.jsonl", "data[1].jsonl", "a[1]/rows.jsonl", "s*r/**/rows.jsonl", ".h/rows.jsonl"])
def test_only_the_file_that_exists_is_read_whatever_its_path_would_match(name, is_streaming, tmp_path):
    for other in ("x1.jsonl", "data1.jsonl", "a1/rows.jsonl", "sr/sub/rows.jsonl"):
        write(tmp_path / other, [{"prompt": "of another file"}])
    file = write(tmp_path / name, ROWS[:1])
    assert prompts(source(file, is_streaming=is_streaming).load()) == ["0"]


def test_a_relative_name_is_taken_literally_too(tmp_path, monkeypatch):
    write(tmp_path / "data1.jsonl", [{"prompt": "of another file"}])
    write(tmp_path / "data[1].jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    assert prompts(source("data[1].jsonl").load()) == ["0"]


@STREAMED
@pytest.mark.parametrize("name", ["a[1]", "b[2]/sub", "plain"])
def test_a_folder_is_read_with_its_splits_whatever_its_path_would_match(name, is_streaming, tmp_path):
    for folder in ("a1", "b2/sub"):
        write(tmp_path / folder / "train.jsonl", [{"prompt": "of another folder"}])
    write(tmp_path / name / "train.jsonl", ROWS[:2])
    write(tmp_path / name / "test.jsonl", ROWS[2:3])
    loaded = [source(tmp_path / name, split, is_streaming=is_streaming).load() for split in ("train", "test")]
    assert [prompts(rows) for rows in loaded] == [["0", "1"], ["2"]]


def test_a_folder_with_brackets_that_declares_its_splits_is_refused_not_read_otherwise(tmp_path):
    write(tmp_path / "a[1]" / "train.jsonl")
    card = "---\nconfigs:\n- config_name: main\n  data_files: other.jsonl\n---\n"
    (tmp_path / "a[1]" / "README.md").write_text(card)
    with pytest.raises(GKDDataError, match=r"declares its own splits.*rename it"):
        source(tmp_path / "a[1]").load()


@pytest.mark.parametrize("name", ["x*.jsonl", "data/*", "rows[0-9].jsonl", "**/*.parquet"])
def test_a_pattern_is_refused(name, tmp_path):
    write(tmp_path / "x1.jsonl")
    with pytest.raises(GKDDataError, match="patterns are not expanded"):
        source(tmp_path / name)


@pytest.mark.parametrize("split", ["test", "validation", "test[:10]", "train+test", "train[:1]+train[2:]"])
def test_a_file_has_no_split_but_train(split, tmp_path):
    with pytest.raises(GKDDataError, match=r"is one file, which has no split .*--eval_dataset.*train\[90%:\]"):
        source(write(tmp_path / "rows.jsonl"), split)


def test_a_part_of_a_file_is_taken(tmp_path):
    file = write(tmp_path / "rows.jsonl")
    assert prompts(source(file, "train[90%:]").load()) == ["9"]
    assert prompts(source(file, "test[:2]", file_splits=("test", "train")).load()) == ["0", "1"]


def test_a_part_of_a_stream_is_refused(tmp_path):
    with pytest.raises(GKDDataError, match="can't be streamed"):
        source(write(tmp_path / "rows.jsonl"), "train[:3]", is_streaming=True)


@pytest.mark.parametrize(
    ("split", "other", "is_shared"),
    [
        ("train", "train", True),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[8:]", True),
        ("train[:-1]", "train[-1:]", False),
        ("train[:2]", "train[2:4]", False),
    ],
)
def test_parts_overlap_where_they_share_rows(split, other, is_shared, tmp_path):
    file = write(tmp_path / "rows.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    train = source(file, split)
    rows = train.load()
    assert train.overlaps(rows, source(file, other)) is is_shared
    own = other.replace("train", "test")
    assert train.overlaps(rows, source(tmp_path / "link.jsonl", own, file_splits=("test", "train"))) is is_shared
    assert not train.overlaps(rows, source(write(tmp_path / "other.jsonl"), other))


@pytest.mark.parametrize(
    ("split", "other", "is_shared"),
    [("train", "test", False), ("train", "train[:1]", True), ("train+test", "test", True), ("all", "test", True)],
)
def test_splits_of_a_folder_overlap_where_they_share_rows(split, other, is_shared, tmp_path):
    write(tmp_path / "folder" / "train.jsonl")
    write(tmp_path / "folder" / "test.jsonl")
    train = source(tmp_path / "folder", split)
    assert train.overlaps(train.load(), source(tmp_path / "folder", other)) is is_shared


BROKEN = {
    '{"prompt": "0"}\n\n{"prompt": "1"\n': "line 3 is not JSON: Expecting ',' delimiter, at column 15",
    '{"prompt": "0"}\n{"prompt": "cut o': "line 2 is not JSON: Unterminated string starting at, at column 12",
    '{"prompt": "0"}\n3\n': 'line 2: expected an object such as {"prompt": "..."}; got 3',
    '{"prompt": "0"}\n{"prompt": "0", "prompt": "1"}\n': "line 2 is not JSON: the key 'prompt' occurs twice",
    '{"prompt": "0"}\n{"prompt": "\xff"}\n': "line 2 is not JSON: 'utf-8' codec can't decode byte 0xff",
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("text", [text for text in BROKEN if "\xff" not in text])
def test_the_first_broken_line_of_a_file_is_named(text, suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_text(text)
    with pytest.raises(GKDDataError) as refusal:
        source(file).load()
    assert BROKEN[text] in str(refusal.value)
    assert str(file) in str(refusal.value)


@STREAMED
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_line_is_named_when_it_is_reached_later(text, is_streaming, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(text.encode("latin-1"))
    rows = source(tmp_path / "rows.jsonl", is_streaming=is_streaming)
    with pytest.raises(GKDDataError) as refusal, naming_broken_lines(rows, None):
        list(rows.load())
    assert BROKEN[text] in str(refusal.value)


def test_a_broken_line_of_a_folder_is_named_with_its_file(tmp_path):
    write(tmp_path / "folder" / "train-0.jsonl")
    (tmp_path / "folder" / "train-1.jsonl").write_text('{"prompt": "0"}\n{"prompt": \n')
    with pytest.raises(GKDDataError, match=r"train-1\.jsonl, line 2 is not JSON: Expecting value"):
        source(tmp_path / "folder").load()


def test_a_broken_list_of_rows_is_named_by_its_line(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"prompt": "0"},\n{"prompt" "1"}\n]\n')
    with pytest.raises(GKDDataError, match=r"rows\.json, line 3 is not JSON: Expecting ':' delimiter, at column 11"):
        source(tmp_path / "rows.json").load()


def test_errors_that_no_broken_line_explains_stay_what_they_are(tmp_path):
    streamed = source(write(tmp_path / "rows.jsonl"), is_streaming=True)
    with pytest.raises(ValueError, match="of somebody else"), naming_broken_lines(streamed):
        raise ValueError("of somebody else")


def test_a_csv_file_that_cannot_be_read_is_an_error_with_the_cause(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\na\nb,c\n")
    with pytest.raises(GKDDataError, match=r"could not load.*Expected 1 fields in line 3, saw 2"):
        source(tmp_path / "rows.csv").load()


@STREAMED
def test_an_empty_file_is_refused(is_streaming, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(GKDDataError, match=r"expected at least one row; .* is empty"):
        source(tmp_path / "rows.jsonl", is_streaming=is_streaming).load()


@STREAMED
def test_rows_of_gsm8k_become_the_conversations_that_compare_measures_on(is_streaming, tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"It is #### {n + 1}", "topic": "sums"} for n in range(2)]
    asked = source(write(tmp_path / "gsm8k.jsonl", rows), is_streaming=is_streaming)
    assert list(in_format(asked, asked.load())) == [dict(row) | {"topic": "sums"} for row in usable_rows(rows)]
    assert INSTRUCTION in next(iter(in_format(asked, asked.load())))["messages"][0]["content"]


@STREAMED
@pytest.mark.parametrize("columns", [{"prompt": "hello", "question": "?", "answer": "!"}, {"text": "hello"}])
def test_rows_in_a_format_of_training_stay_as_they_are(columns, is_streaming, tmp_path):
    asked = source(write(tmp_path / "rows.jsonl", [columns]), is_streaming=is_streaming)
    assert list(in_format(asked, asked.load())) == [columns]


@STREAMED
def test_a_problem_without_an_answer_is_left_for_the_preparation_to_drop(is_streaming, tmp_path):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "?", "answer": "who knows"}]
    asked = source(write(tmp_path / "gsm8k.jsonl", rows), is_streaming=is_streaming)
    assert [row["messages"] is None for row in in_format(asked, asked.load())] == [False, True]


@STREAMED
@pytest.mark.parametrize("answer", ["Paris", {"value": "Paris"}, None], ids=["text", "object", "none"])
def test_other_questions_and_answers_are_not_taken_for_problems(answer, is_streaming, tmp_path):
    rows = [{"question": "Capital of France?", "answer": answer}]
    asked = source(write(tmp_path / "rows.jsonl", rows), is_streaming=is_streaming)
    with pytest.raises(GKDDataError, match=r"got the columns \['answer', 'question'\]: rename them"):
        in_format(asked, asked.load())


@STREAMED
def test_columns_that_are_not_read_are_named(is_streaming, tmp_path):
    asked = source(write(tmp_path / "rows.jsonl", [{"instruction": "Hi", "output": "Ho"}]), is_streaming=is_streaming)
    message = (
        r"--dataset: expected rows with .* got the columns \['instruction', 'output'\]: rename them, or train from"
    )
    with pytest.raises(GKDDataError, match=message):
        in_format(asked, asked.load())

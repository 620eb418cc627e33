"""Rows that differ in type: every text of a list comes back as it is, and where a file's may not have is found."""

import json

import pytest
from datasets import Dataset, Features, Json, List, Value, load_dataset

from gkd_trainer.data.mixed import dataset_of, parsed_texts

TEXTS = ["4", '{"a":1,   "b":2.0}', '"Paris"', "[1, 2]", "null", "true", 'say "é"\n', ""]


def part(text):
    return [{"type": "text", "text": text}]


def conversation(question, answer, **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def calling(arguments):
    question, answer = conversation("q", "x", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    return [{**question, "tool_calls": None}, answer]  # with other keys, `datasets` stores whole messages as JSON


def bare(value):
    """A value without the None that Arrow fills in."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if item is not None}
    return [bare(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": conversation(part("q"), text)} for text in TEXTS],
        [{"messages": conversation(text, "x")} for text in TEXTS] + [{"messages": conversation(part("q"), "1")}],
        [{"messages": calling({"zip": "12345"})}, {"messages": calling({"zip": 5})}],
        [{"messages": calling('{"a": "5"}')}, {"messages": calling({"a": "5"})}],
        [{"prompt": text, "completion": text} for text in TEXTS] + [{"prompt": conversation("1", "2")}],
    ],
    ids=["answers", "questions", "arguments", "arguments in JSON", "columns"],
)
def test_texts_that_are_json_come_back_as_they_are_beside_values_of_other_types(rows):
    assert [bare(row) for row in dataset_of(rows, "train")] == bare(rows)


def test_rows_of_one_form_are_stored_as_before():
    rows = [{"messages": conversation("1", "2")}]
    expected = Dataset.from_list(rows, on_mixed_types="use_json")
    assert dataset_of(rows, "train").features == expected.features


def test_a_file_of_both_forms_of_content_may_have_lost_texts(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": conversation(part("q"), text), "other": text} for text in TEXTS]
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path))
    assert dataset[2]["messages"][1]["content"] == "Paris"  # without its quotes, which `datasets` took for JSON
    assert parsed_texts(dataset.features, {"messages"}) == ["messages[].content"]
    assert parsed_texts(dataset.features, {"prompt"}) == parsed_texts(None, {"messages"}) == []


def test_json_that_holds_no_texts_of_its_own_loses_none():
    call = {"name": Value("string"), "arguments": Json()}
    features = {"messages": List({"content": Value("string"), "tool_calls": List(call)}), "prompt": List(Json())}
    assert parsed_texts(Features(features), features) == []
    features["messages"] = List({"content": Value("string"), "tool_calls": List({"arguments": {"zip": Json()}})})
    assert parsed_texts(Features(features), features) == ["messages[].tool_calls[].arguments.zip"]

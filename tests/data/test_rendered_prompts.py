"""Prompts by the template of a teacher with another tokenizer."""

from dataclasses import replace

import pytest
from datasets import Dataset

from gkd_trainer.batch_keys import TEACHER_PROMPT_IDS
from gkd_trainer.data.prepare import prepare_dataset
from gkd_trainer.data.rendered_prompts import RenderedPrompts
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.rules import RowRules
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.data.tokens import RowDropped
from tests.vocabularies import sentencepiece_backend, sentencepiece_like

USER, TURN = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}
RULES = RowRules(frozenset(), 256, 8, "all_turns", is_generating=False, needs_completion=False, needs_prompt=False)


@pytest.fixture(scope="module")
def teacher():
    return sentencepiece_like(sentencepiece_backend())


def prompts_of(teacher):
    return TeacherPrompts(teacher, rendered=RenderedPrompts(teacher))


def text_of(teacher, row):
    return teacher.decode(RenderedPrompts(teacher).of(row))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, TURN]},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]},
        {"prompt": [USER], "completion": [TURN]},
        {"prompt": [USER], "completion": "Hello there"},
        {"prompt": [USER]},
        {"prompt": [USER], "completion": None, "messages": None},
    ],
)
def test_the_teachers_template_renders_what_comes_before_the_last_turn(teacher, row):
    expected = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert text_of(teacher, row) == expected


def test_text_parts_are_read_as_the_text_that_they_hold(teacher):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, TURN]}
    assert text_of(teacher, row) == text_of(teacher, {"messages": [USER, TURN]})


def test_earlier_turns_are_part_of_the_prompt(teacher):
    text = text_of(teacher, {"messages": [USER, TURN, USER, TURN]})
    assert text.count("Hello there") == 1
    assert text.endswith("<start_of_turn>model\n")


@pytest.mark.parametrize("row", [{"messages": [USER, TURN, USER]}, {"prompt": [USER], "completion": [TURN, USER]}])
def test_a_conversation_that_ends_with_the_user_is_a_prompt_as_a_whole_if_it_is_completed(teacher, row):
    prompt, whole = (RenderedPrompts(teacher).of(row, is_generating=is_generating) for is_generating in (False, True))
    assert prompt == RenderedPrompts(teacher).of({"prompt": [USER]})
    assert whole == RenderedPrompts(teacher).of({"prompt": [USER, TURN, USER]})


@pytest.mark.parametrize("completion", [None, "Hello there", [TURN]])
def test_a_prompt_of_several_turns_is_rendered_whole(teacher, completion):
    text = text_of(teacher, {"prompt": [USER, TURN, USER], "completion": completion})
    assert text.count("Hi") == 2
    assert text.count("Hello there") == 1
    assert text.endswith("<end_of_turn>\n<start_of_turn>model\n")


def test_a_completion_of_several_turns_is_read_up_to_its_last(teacher):
    text = text_of(teacher, {"prompt": [USER], "completion": [TURN, USER, TURN]})
    assert (text.count("Hi"), text.count("Hello there")) == (2, 1)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Hi"},
        {"prompt": "Hi", "completion": "Hello"},
        {"input_ids": [5], "messages": [USER]},
        {"messages": [TURN]},
    ],
)
def test_rows_without_messages_before_a_turn_have_none(teacher, row):
    assert RenderedPrompts(teacher).of(row) == []


def test_a_teacher_without_a_template_has_none():
    plain = sentencepiece_like(sentencepiece_backend(), chat_template=None)
    assert RenderedPrompts(plain).of({"messages": [USER, TURN]}) == []


def test_a_rows_own_prompt_comes_first(teacher):
    prompts = prompts_of(teacher)
    row = {"messages": [USER, TURN]}
    assert prompts.ids_of({**row, TEACHER_PROMPT_IDS: [7, 8]}) == [7, 8]
    assert teacher.decode(prompts.ids_of({**row, "teacher_prompt": "one"})) == "<bos>one"
    assert prompts.ids_of(row) == RenderedPrompts(teacher).of(row)


def test_ids_that_the_student_lacks_are_no_reason_to_drop_a_row(teacher, byte_level):
    rules = replace(RULES, vocab_size=len(byte_level()))
    prompts = prompts_of(teacher)
    row = {"text": "Hi", TEACHER_PROMPT_IDS: [rules.vocab_size + 5]}
    assert (
        RowPreparer.create(byte_level(), rules, None, teacher_prompts=prompts).prepare(row).teacher_prompt_ids
        == row[TEACHER_PROMPT_IDS]
    )
    with pytest.raises(RowDropped, match="beyond the models'"):
        RowPreparer.create(byte_level(), rules, None, teacher_prompts=TeacherPrompts(byte_level())).prepare(row)


def test_messages_that_the_template_refuses_drop_the_row():
    strict = sentencepiece_like(sentencepiece_backend(), "{{ raise_exception('System role not supported') }}")
    with pytest.raises(RowDropped, match=r"the teacher's chat template \(System role not supported\)"):
        RenderedPrompts(strict).of({"messages": [USER, TURN]})


def test_calls_that_the_template_leaves_out_drop_the_row():
    plain = sentencepiece_like(sentencepiece_backend(), "{% for m in messages %}{{ m.content }}{% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {}}}]}
    with pytest.raises(RowDropped, match=r"the teacher's chat template \(it leaves out tool calls\)"):
        RenderedPrompts(plain).of({"messages": [USER, call, {"role": "tool", "content": "4"}, TURN]})


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prepared_data_set_has_them_beside_its_tokens(teacher, byte_level, is_stream):
    dataset = Dataset.from_list([{"messages": [USER, TURN]}, {"messages": [USER, TURN, USER, TURN]}])
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    rows = list(prepare_dataset(dataset, byte_level(), RULES, teacher_prompts=prompts_of(teacher)))
    assert [teacher.decode(row[TEACHER_PROMPT_IDS]).count("<end_of_turn>") for row in rows] == [1, 3]
    [row] = prepare_dataset(
        [{"text": "Hi"}],
        byte_level(),
        RULES,
        teacher_prompts=prompts_of(teacher),
    )
    assert row[TEACHER_PROMPT_IDS] == []
    [row] = prepare_dataset([{"text": "Hi"}], byte_level(), RULES)
    assert TEACHER_PROMPT_IDS not in row

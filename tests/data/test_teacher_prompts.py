"""The column `teacher_prompt`: rendered by the teacher's template, and in place of all before the last turn."""

import pytest
from datasets import Dataset

from gkd_trainer.batch_keys import TEACHER_PROMPT_IDS
from gkd_trainer.data import prepare_dataset
from gkd_trainer.data.teacher_prompts import TEACHER_PROMPT, TeacherPrompts, only_last_run
from gkd_trainer.errors import GKDDataError

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "I am fine"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two three"},
]
HINT = [{"role": "system", "content": "two"}, {"role": "user", "content": "one"}]


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_a_conversation_with_a_prompt_for_the_teacher_is_trained_on_in_its_last_turn_only(byte_level, rules):
    tokenizer = byte_level()
    rows = [{"messages": CHAT, TEACHER_PROMPT: HINT}, {"messages": CHAT, TEACHER_PROMPT: None}]
    first, second = prepare_dataset(rows, tokenizer, rules())
    assert trained(tokenizer, first) == "two three<|im_end|>"
    assert trained(tokenizer, second) == "I am fine<|im_end|>two three<|im_end|>"
    assert first["input_ids"] == second["input_ids"]
    assert tokenizer.decode(first[TEACHER_PROMPT_IDS]) == (
        "<|im_start|>system\ntwo<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second[TEACHER_PROMPT_IDS] == []


def test_where_prompts_are_made_from_completions_every_conversation_is_trained_on_in_its_last_turn_only(
    byte_level, rules
):
    tokenizer = byte_level()
    [row] = prepare_dataset(
        [{"messages": CHAT}], tokenizer, rules(), teacher_prompts=TeacherPrompts(tokenizer, may_follow=True)
    )
    assert trained(tokenizer, row) == "two three<|im_end|>"


OPEN = [*CHAT, {"role": "user", "content": "four"}]


@pytest.mark.parametrize("may_follow", [False, True])
def test_a_conversation_that_ends_with_the_user_is_only_a_prompt_beside_the_teachers_own(
    byte_level, rules, on_policy, may_follow
):
    """That prompt can't be one for the turns in the middle as well."""
    tokenizer, prompts = byte_level(), TeacherPrompts(byte_level(), may_follow=may_follow)
    rows = [{"messages": OPEN, **({} if may_follow else {TEACHER_PROMPT: HINT})}]
    [row] = prepare_dataset(rows, tokenizer, on_policy(), teacher_prompts=prompts)
    [prompt] = prepare_dataset([{"prompt": OPEN}], tokenizer, on_policy())
    assert (row["input_ids"], row["labels"]) == (prompt["input_ids"], [-100] * len(prompt["input_ids"]))
    with pytest.raises(GKDDataError, match="1 no assistant turn after the teacher's own prompt"):
        prepare_dataset(rows, tokenizer, rules(is_generating=True), teacher_prompts=prompts)
    [row] = prepare_dataset(rows, tokenizer, rules(), teacher_prompts=prompts)
    assert trained(tokenizer, row) == "two three<|im_end|>"


def test_only_the_last_run_of_labels_stays():
    assert only_last_run([5, -100, 6, 7, -100]) == [-100, -100, 6, 7, -100]
    assert only_last_run([5, 6]) == [5, 6]
    assert only_last_run([-100, -100]) == [-100, -100]


def test_it_is_rendered_by_the_teachers_tokenizer(byte_level, rules):
    teachers = byte_level("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    rows = [{"prompt": "one", "completion": " two", TEACHER_PROMPT: HINT}]
    [row] = prepare_dataset(rows, byte_level(), rules(), teacher_prompts=TeacherPrompts(teachers))
    assert byte_level().decode(row[TEACHER_PROMPT_IDS]) == "[two][one]"


def test_text_parts_of_its_messages_are_one_text(byte_level, rules):
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": " one"}]
    teachers = byte_level("{{ messages[0]['content'] }}")
    rows = [{"prompt": "one", "completion": " two", TEACHER_PROMPT: [{"role": "user", "content": parts}]}]
    [row] = prepare_dataset(rows, byte_level(), rules(), teacher_prompts=TeacherPrompts(teachers))
    assert teachers.decode(row[TEACHER_PROMPT_IDS]) == "two one"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_text_is_taken_as_it_is_behind_the_bos(byte_level, rules, is_stream):
    tokenizer = byte_level(has_bos=True)
    rows = Dataset.from_list([{"prompt": "one", "completion": " two", TEACHER_PROMPT: "two one"}])
    [row] = prepare_dataset(rows.to_iterable_dataset() if is_stream else rows, tokenizer, rules())
    assert tokenizer.decode(row[TEACHER_PROMPT_IDS]) == "<s>two one"


def test_rows_without_the_column_get_no_prompts(byte_level, rules):
    assert TEACHER_PROMPT_IDS not in prepare_dataset([{"messages": CHAT}], byte_level(), rules()).column_names


@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_formatting_func_may_give_it_or_leave_it_where_it_is(byte_level, rules, is_repeated):
    tokenizer = byte_level()
    rows = [{"q": "one", "a": " two", **({} if is_repeated else {TEACHER_PROMPT: "three"})}]

    def formatted(row):
        return {"prompt": row["q"], "completion": row["a"], **({TEACHER_PROMPT: "three"} if is_repeated else {})}

    [row] = prepare_dataset(rows, tokenizer, rules(), formatting_func=formatted)
    assert tokenizer.decode(row[TEACHER_PROMPT_IDS]) == "three"


def test_tools_and_template_variables_of_the_row_are_the_teachers_too(byte_level, rules):
    teachers = byte_level("{{ mood }} {{ messages[0]['content'] }}")
    rows = [{"prompt": "one", "completion": " two", TEACHER_PROMPT: HINT, "chat_template_kwargs": {"mood": "calm"}}]
    [row] = prepare_dataset(rows, byte_level(), rules(), teacher_prompts=TeacherPrompts(teachers))
    assert byte_level().decode(row[TEACHER_PROMPT_IDS]) == "calm two"


def test_rows_that_are_already_prepared_stay_as_they_are(byte_level, rules):
    rows = [{"messages": CHAT, TEACHER_PROMPT: HINT}]
    once = prepare_dataset(rows, byte_level(), rules()).remove_columns(["messages", TEACHER_PROMPT])
    twice = prepare_dataset(once, byte_level(), rules())
    assert twice[0] == once[0]


def test_token_rows_may_hold_the_teachers_prompt_as_tokens(rules):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8], TEACHER_PROMPT_IDS: [9, 10]}]
    [row] = prepare_dataset(rows, None, rules())
    assert row["labels"] == [-100, -100, 7, 8]
    assert row[TEACHER_PROMPT_IDS] == [9, 10]


@pytest.mark.parametrize(("limit", "n_rows"), [(7, 2), (6, 1)])
def test_a_prompt_too_long_for_the_teacher_drops_its_row(rules, limit, n_rows, caplog):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    rows = [{**row, TEACHER_PROMPT_IDS: [9] * 5}, {**row, TEACHER_PROMPT_IDS: [9]}]
    prepared = prepare_dataset(rows, None, rules(), teacher_prompts=TeacherPrompts(None, limit))
    assert len(prepared) == n_rows
    is_dropped = "1 of 2 rows dropped: 1 teacher_prompt with its completion longer than the teacher's 6" in caplog.text
    assert is_dropped == (n_rows == 1)


@pytest.mark.parametrize(("limit", "n_rows"), [(5, 2), (4, 1)])
def test_an_encoder_reads_the_prompt_without_the_completion(rules, limit, n_rows, caplog):
    row = {"input_ids": [5, 6], "labels": [7, 8, 9]}
    rows = [{**row, TEACHER_PROMPT_IDS: [9] * 5}, {**row, TEACHER_PROMPT_IDS: [9]}]
    prompts = TeacherPrompts(None, limit, is_encoder_decoder=True)
    prepared = prepare_dataset(rows, None, rules(is_encoder_decoder=True), teacher_prompts=prompts)
    assert [len(row[TEACHER_PROMPT_IDS]) for row in prepared] == [5, 1][2 - n_rows :]
    assert prepared[0]["labels"] == [7, 8, 9]
    assert ("1 teacher_prompt longer than the teacher's 4 tokens" in caplog.text) == (n_rows == 1)


@pytest.mark.parametrize(("limit", "n_rows"), [(9, 2), (8, 1)])
def test_where_completions_are_generated_there_is_room_for_the_longest(on_policy, limit, n_rows):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}  # max_new_tokens is 8
    rows = [{**row, TEACHER_PROMPT_IDS: [9]}, {**row, TEACHER_PROMPT_IDS: []}]
    assert len(prepare_dataset(rows, None, on_policy(), teacher_prompts=TeacherPrompts(None, limit))) == n_rows


def test_a_completion_is_cut_before_it_is_measured(rules):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], TEACHER_PROMPT_IDS: [9] * 5}]
    [row] = prepare_dataset(rows, None, rules(max_length=3), teacher_prompts=TeacherPrompts(None, 6))
    assert row["input_ids"] == [5, 6, 7]


def test_no_row_whose_prompt_fits_is_an_error(rules):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], TEACHER_PROMPT_IDS: [9] * 50}]
    with pytest.raises(GKDDataError, match="none of the 1 rows can be used: 1 teacher_prompt with its"):
        prepare_dataset(rows, None, rules(), teacher_prompts=TeacherPrompts(None, 40))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty teacher_prompt"),
        ([], "no messages"),
        ([{"role": "user"}], "a message without content"),
        (5, "messages are not a list"),
    ],
)
def test_a_prompt_that_can_not_be_read_drops_its_row(byte_level, rules, prompt, reason):
    with pytest.raises(GKDDataError, match=reason):
        prepare_dataset([{"prompt": "one", "completion": " two", TEACHER_PROMPT: prompt}], byte_level(), rules())


def test_a_prompt_that_the_template_refuses_drops_its_row(byte_level, rules):
    teachers = byte_level("{{ raise_exception('no system messages') }}")
    rows = [{"prompt": "one", "completion": " two", TEACHER_PROMPT: HINT}]
    with pytest.raises(GKDDataError, match=r"teacher_prompt refused by the chat template \(no system messages"):
        prepare_dataset(rows, byte_level(), rules(), teacher_prompts=TeacherPrompts(teachers))


def test_a_token_beyond_the_models_drops_the_row(rules):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], TEACHER_PROMPT_IDS: [20]}]
    with pytest.raises(GKDDataError, match="a token id beyond the models' 20 tokens"):
        prepare_dataset(rows, None, rules(vocab_size=20))


def test_messages_need_a_chat_template(byte_level, rules):
    rows = [{"prompt": "one", "completion": " two", TEACHER_PROMPT: HINT}]
    with pytest.raises(GKDDataError, match="expected a tokenizer with a chat template, since teacher_prompt holds"):
        prepare_dataset(rows, byte_level(None), rules())


def test_text_needs_a_tokenizer(rules):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], TEACHER_PROMPT: "one"}]
    with pytest.raises(GKDDataError, match="since there is no tokenizer; got a column teacher_prompt"):
        prepare_dataset(rows, None, rules())


def test_a_prompt_of_which_the_first_row_knows_nothing_drops_its_row(byte_level, rules, caplog):
    rows = [{"q": "one"}, {"q": "two"}]

    def formatted(row):
        return {"prompt": row["q"], "completion": " x", **({TEACHER_PROMPT: "three"} if row["q"] == "two" else {})}

    assert len(prepare_dataset(rows, byte_level(), rules(), formatting_func=formatted)) == 1
    assert "teacher_prompt, but the first row has none: give that one too, or None" in caplog.text

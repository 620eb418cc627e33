"""Rows: each format, and each reason why a row can't be used."""

import json

import numpy as np
import pytest

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.tokens import RowDropped
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import prompt_length

# Writes what it was given, so that a test can see it.
SHOWING = (
    "{% if tools %}{{ 'tools:' + (tools | tojson) }}{% endif %}"
    "{% if mood is defined %}{{ 'mood:' + mood }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}


def prepare(row, tokenizer, rules):
    return RowPreparer.create(tokenizer, rules, None).prepare(row)


def reason(row, tokenizer, rules):
    with pytest.raises(RowDropped) as dropped:
        prepare(row, tokenizer, rules)
    return dropped.value.reason


def trained(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def test_a_text_completion_gets_the_eos_that_it_lacks(byte_level, rules):
    tokenizer = byte_level()
    for completion in (" Paris", " Paris<|im_end|>"):
        row = prepare({"prompt": "The capital of France is", "completion": completion}, tokenizer, rules())
        assert tokenizer.decode(row.input_ids) == "The capital of France is Paris<|im_end|>"
        assert trained(tokenizer, row.labels) == " Paris<|im_end|>"


def test_the_eos_is_trained_on_even_if_it_is_also_the_padding(byte_level, rules):
    tokenizer = byte_level()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": "hello", "completion": " you"},
        {"text": "hello"},
    ]
    for row in rows:
        labels = prepare(row, tokenizer, rules()).labels
        assert [label for label in labels if label != IGNORE_INDEX][-1] == tokenizer.eos_token_id


def test_a_text_completion_ends_at_its_first_stop_token(byte_level, rules):
    tokenizer = byte_level()
    stop_ids = frozenset([tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    row = prepare({"prompt": "one", "completion": " two<|endoftext|> three"}, tokenizer, rules(stop_ids=stop_ids))
    assert trained(tokenizer, row.labels) == " two<|endoftext|>"


def test_the_prompt_of_a_text_row_is_tokenised_apart_from_its_completion(byte_level, rules):
    tokenizer = byte_level()
    row = prepare({"prompt": "The cap", "completion": "ital"}, tokenizer, rules())
    assert row.input_ids[: row.n_prompt] == tokenizer("The cap")["input_ids"]
    assert tokenizer("The capital")["input_ids"][: row.n_prompt] != row.input_ids[: row.n_prompt]


def test_text_gets_the_tokenizers_bos_once(byte_level, rules, on_policy):
    tokenizer = byte_level(has_bos=True)
    for text in ("hello", "<s>hello"):
        expected = ["<s>hello<|im_end|>", "<s>hello you<|im_end|>", "<s>hello"]
        rows = [
            prepare({"text": text}, tokenizer, rules()),
            prepare({"prompt": text, "completion": " you"}, tokenizer, rules()),
            prepare({"prompt": text}, tokenizer, on_policy()),
        ]
        assert [tokenizer.decode(row.input_ids) for row in rows] == expected
        assert trained(tokenizer, rows[1].labels) == " you<|im_end|>"


def test_messages_get_no_bos_beside_the_templates_own(byte_level, rules):
    tokenizer = byte_level(has_bos=True)
    row = prepare({"messages": [QUESTION, ANSWER]}, tokenizer, rules())
    assert tokenizer.decode(row.input_ids).startswith("<|im_start|>")


def test_a_text_row_is_trained_from_its_first_token(byte_level, rules):
    tokenizer = byte_level()
    row = prepare({"text": "one two"}, tokenizer, rules())
    assert row.labels == row.input_ids == [*tokenizer("one two")["input_ids"], tokenizer.eos_token_id]
    assert row.n_prompt == 0


def test_a_text_row_of_several_documents_is_all_trained_on(byte_level, rules):
    row = prepare({"text": "one<|im_end|>two<|im_end|>"}, byte_level(), rules())
    assert row.labels == row.input_ids


@pytest.mark.parametrize("row", [{"text": "one two"}, {"text": ""}, {"input_ids": [1, 2]}], ids=str)
def test_a_format_without_prompts_is_refused_if_each_row_needs_one(byte_level, on_policy, row):
    with pytest.raises(GKDDataError, match=r"expected a prompt in each row.*lmbda=1\.0"):
        prepare(row, byte_level(), on_policy())


@pytest.mark.parametrize("row", [{"prompt": "", "completion": "b"}, {"input_ids": [1], "labels": [1]}], ids=str)
def test_a_row_whose_prompt_is_empty_is_dropped_if_each_row_needs_one(byte_level, on_policy, row):
    assert reason(row, byte_level(), on_policy()) == "no prompt, although lmbda=1.0 generates every completion"


def test_the_column_of_text_can_be_named(byte_level, rules):
    row = prepare({"body": "one two"}, byte_level(), rules(text_field="body"))
    assert row.input_ids == row.labels


def test_a_bare_prompt_is_a_row_without_trained_tokens(byte_level, on_policy):
    tokenizer = byte_level()
    for prompt in ("hello", [QUESTION]):
        row = prepare({"prompt": prompt}, tokenizer, on_policy())
        assert set(row.labels) == {IGNORE_INDEX}
        assert row.n_prompt == prompt_length(row.labels) == len(row.input_ids)


def test_a_prompt_of_messages_ends_with_the_generation_prompt(byte_level, on_policy):
    tokenizer = byte_level()
    row = prepare({"prompt": [QUESTION]}, tokenizer, on_policy())
    expected = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"]
    assert row.input_ids == expected


FOLLOW_UP = {"role": "user", "content": "And of Italy?"}


def test_a_conversation_that_ends_with_the_user_is_completed_there_and_trained_on_in_its_turns(
    byte_level, rules, on_policy
):
    tokenizer, messages = byte_level(), [QUESTION, ANSWER, FOLLOW_UP]
    prompt = prepare({"prompt": messages}, tokenizer, on_policy()).input_ids
    off_policy = prepare({"messages": messages}, tokenizer, rules())
    assert not off_policy.prompt_ids
    for row in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}):
        mixed, only_on_policy = (prepare(row, tokenizer, each) for each in (rules(is_generating=True), on_policy()))
        assert mixed.prompt_ids == only_on_policy.prompt_ids == prompt
        assert mixed.n_prompt == len(prompt)
        assert (mixed.input_ids, mixed.labels) == (off_policy.input_ids, off_policy.labels)
    assert trained(tokenizer, off_policy.labels) == "Paris.<|im_end|>"


def test_a_conversation_that_ends_with_a_tool_is_completed_there_too(byte_level, rules):
    tokenizer, messages = byte_level(), [QUESTION, ANSWER, {"role": "tool", "content": "42"}]
    row = prepare({"messages": messages}, tokenizer, rules(is_generating=True))
    assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")


def test_the_room_for_a_completion_is_counted_from_the_last_message(byte_level, rules):
    row, tokenizer = {"messages": [QUESTION, ANSWER, FOLLOW_UP]}, byte_level()
    n_prompt = prepare(row, tokenizer, rules(is_generating=True)).n_prompt
    assert prepare(row, tokenizer, rules(is_generating=True, max_length=n_prompt + 8)).n_prompt == n_prompt
    too_short = rules(is_generating=True, max_length=n_prompt + 7)
    assert reason(row, tokenizer, too_short).startswith("prompt longer than max_length - max_new_tokens")


def test_a_prompt_that_ends_with_an_assistant_message_is_continued(byte_level, on_policy):
    tokenizer = byte_level()
    row = prepare({"prompt": [QUESTION, {"role": "assistant", "content": "It is"}]}, tokenizer, on_policy())
    assert tokenizer.decode(row.input_ids).endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize("role", ["system", "ipython"])
def test_a_prompt_may_end_with_any_role_that_the_template_takes(byte_level, on_policy, role):
    tokenizer = byte_level()
    row = prepare({"prompt": [QUESTION, {"role": role, "content": "fine"}]}, tokenizer, on_policy())
    assert tokenizer.decode(row.input_ids).endswith(f"<|im_start|>{role}\nfine<|im_end|>\n<|im_start|>assistant\n")


def test_a_bare_prompt_is_refused_if_completions_come_from_the_data(byte_level, rules):
    for prompt in ("hello", [QUESTION]):
        with pytest.raises(GKDDataError, match=r"lmbda=1\.0 .* or seq_kd=True"):
            prepare({"prompt": prompt}, byte_level(), rules())


def test_a_row_that_lacks_the_completion_of_others_is_dropped(byte_level, rules):
    assert "seq_kd=True" in reason({"prompt": "hello", "completion": None}, byte_level(), rules())


def test_messages_without_an_assistant_turn_are_a_prompt(byte_level, rules, on_policy):
    tokenizer = byte_level()
    row = prepare({"messages": [QUESTION]}, tokenizer, on_policy())
    assert row == prepare({"prompt": [QUESTION]}, tokenizer, on_policy())
    assert reason({"messages": [QUESTION]}, tokenizer, rules()) == "no assistant turn"


def test_a_completion_in_text_answers_a_prompt_of_messages(byte_level, rules):
    tokenizer = byte_level()
    row = prepare({"prompt": [QUESTION], "completion": "Paris."}, tokenizer, rules())
    assert row == prepare({"messages": [QUESTION, ANSWER]}, tokenizer, rules())


@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt")])
def test_conversations_with_from_and_value_are_read(byte_level, rules, roles):
    tokenizer = byte_level()
    conversations = [
        {"from": role, "value": message["content"]} for role, message in zip(roles, (QUESTION, ANSWER), strict=True)
    ]
    row = prepare({"conversations": conversations}, tokenizer, rules())
    assert row == prepare({"messages": [QUESTION, ANSWER]}, tokenizer, rules())
    assert conversations[0]["from"] == roles[0]


@pytest.mark.parametrize("encode", [lambda tools: tools, json.dumps, lambda tools: [*map(json.dumps, tools)]])
def test_tools_reach_the_template(byte_level, rules, on_policy, encode):
    tokenizer = byte_level(SHOWING)
    tools = encode([{"name": "search"}])
    row = prepare({"messages": [QUESTION, ANSWER], "tools": tools}, tokenizer, rules())
    assert tokenizer.decode(row.input_ids).startswith('tools:[{"name": "search"}]<|im_start|>')
    row = prepare({"prompt": [QUESTION], "tools": tools}, tokenizer, on_policy())
    assert tokenizer.decode(row.input_ids).startswith('tools:[{"name": "search"}]<|im_start|>')


def test_chat_template_kwargs_reach_the_template(byte_level, rules, on_policy):
    tokenizer = byte_level(SHOWING)
    extra = {"chat_template_kwargs": {"mood": "fine", "unset": None}}
    row = prepare({"messages": [QUESTION, ANSWER], **extra}, tokenizer, rules())
    assert tokenizer.decode(row.input_ids).startswith("mood:fine<|im_start|>")
    row = prepare({"prompt": [QUESTION], **extra}, tokenizer, on_policy())
    assert tokenizer.decode(row.input_ids).startswith("mood:fine<|im_start|>")


@pytest.mark.parametrize("is_marked", [False, True], ids=["plain", "marked"])
def test_arguments_that_a_template_prints_as_they_are_are_trained_on_as_their_json(byte_level, rules, is_marked):
    begin, end = ("{% generation %}", "{% endgeneration %}") if is_marked else ("", "")
    tokenizer = byte_level(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        + begin
        + "{{ message['content'] }}{% for call in message.tool_calls %}"
        "{{ call.function.arguments }}{% endfor %}{{ '<|im_end|>' }}" + end + "{% else %}{{ message['content'] }}"
        "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    arguments = '{"city": "Paris", "metric": true}'
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    content = """It's "fine". """  # a list with this text, printed, would escape quotes
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    row = prepare({"messages": [QUESTION, answer]}, tokenizer, rules())
    assert trained(tokenizer, row.labels) == f"{content}{arguments}<|im_end|>"


def test_the_none_that_arrow_fills_in_does_not_reach_the_template(byte_level, rules):
    tokenizer = byte_level(SHOWING)
    call = {"function": {"name": "search", "arguments": {"query": "France", "limit": None}}}
    messages = [
        {**QUESTION, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Paris", "tool_calls": None},
        {**ANSWER, "tool_calls": None},
    ]
    row = prepare({"messages": messages, "tools": None, "chat_template_kwargs": None}, tokenizer, rules())
    assert "None" not in (text := tokenizer.decode(row.input_ids))
    assert "null" not in text
    assert '[{"function": {"name": "search", "arguments": {"query": "France"}}}]<|im_end|>' in text


def test_tokenised_rows_with_labels_are_kept_as_they_are(rules):
    row = prepare({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}, None, rules())
    assert (row.input_ids, row.labels, row.n_prompt) == ([1, 2, 3, 4], [-100, 2, -100, 4], 3)


def test_tokenised_rows_without_labels_are_all_trained_on(rules):
    row = prepare({"input_ids": [1, 2, 3], "labels": None}, None, rules())
    assert row.labels == [1, 2, 3]


@pytest.mark.parametrize(
    ("masks", "labels"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 3, 4]),
        ({"assistant_masks": [0, 1, 0, 1]}, [-100, 2, -100, 4]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [-100, -100, -100, 4]),
    ],
)
def test_masks_of_tokenised_rows_say_what_is_trained_on(rules, masks, labels):
    assert prepare({"input_ids": [1, 2, 3, 4], **masks}, None, rules()).labels == labels


def test_padding_of_tokenised_rows_is_removed(rules):
    row = {
        "input_ids": [0, 1, 2, 0],
        "attention_mask": [0, 1, 1, 0],
        "position_ids": [0, 0, 1, 2],
        "mm_token_type_ids": [0, 1, 0, 0],
    }
    prepared = prepare(row, None, rules())
    assert prepared.input_ids == prepared.labels == [1, 2]
    assert prepared.per_token == {"attention_mask": [1, 1], "position_ids": [0, 1], "mm_token_type_ids": [1, 0]}


def test_per_token_columns_are_cut_with_the_row(rules):
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}
    prepared = prepare(row, None, rules(max_length=2))
    assert prepared.per_token == {"attention_mask": [1, 1]}


def test_tokenised_rows_may_be_arrays(rules):
    row = prepare({"input_ids": np.array([1, 2]), "labels": np.array([-100, 2])}, None, rules())
    assert (row.input_ids, row.labels) == ([1, 2], [-100, 2])


def test_tokenised_rows_without_trained_labels_are_prompts(rules, on_policy):
    row = {"input_ids": [1, 2], "labels": [-100, -100]}
    assert prepare(row, None, on_policy()).n_prompt == 2
    assert reason(row, None, rules()) == "no token is trained on"


def test_rows_to_tokenise_need_a_tokenizer(rules):
    with pytest.raises(GKDDataError, match="pass the tokenizer as processing_class"):
        prepare({"messages": [QUESTION, ANSWER]}, None, rules())


def test_messages_need_a_chat_template(byte_level, rules, on_policy):
    for row, row_rules in (
        ({"messages": [QUESTION, ANSWER]}, rules()),
        ({"prompt": [QUESTION]}, on_policy()),
    ):
        with pytest.raises(GKDDataError, match=r"chat template.*this one has none"):
            prepare(row, byte_level(None), row_rules)


def test_unknown_columns_are_refused_by_name(byte_level, rules):
    with pytest.raises(GKDDataError, match=r"got the columns \['answer', 'question'\]"):
        prepare({"question": "hello", "answer": "hello"}, byte_level(), rules())


def test_long_completions_are_cut_at_the_end(byte_level, rules):
    tokenizer = byte_level()
    row = {"messages": [QUESTION, {"role": "assistant", "content": "one two three four five"}]}
    whole = prepare(row, tokenizer, rules())
    cut = prepare(row, tokenizer, rules(max_length=whole.n_prompt + 2))
    assert cut.input_ids == whole.input_ids[: whole.n_prompt + 2]
    assert cut.labels == whole.labels[: whole.n_prompt + 2]
    assert cut.n_prompt == whole.n_prompt


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, {"role": "assistant", "content": ""}]},
        {"prompt": "hello", "completion": ""},
        {"prompt": "hello", "completion": "<|im_end|>"},
        {"prompt": [QUESTION], "completion": [{"role": "assistant", "content": ""}]},
    ],
)
def test_an_empty_completion_is_dropped(byte_level, rules, row):
    assert reason(row, byte_level(), rules()) == "empty completion"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": None}, "nothing in any column that is read"),
        ({"messages": []}, "no messages"),
        ({"messages": "hello"}, "messages are not a list of role and content"),
        ({"messages": ["hello"]}, "messages are not a list of role and content"),
        ({"messages": [{"content": "hello"}]}, "a message without role"),
        ({"messages": [QUESTION, {"content": "hello"}]}, "a message without role"),
        ({"messages": [QUESTION, {"role": 3, "content": "hello"}]}, "a message without role"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "a message without content"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": 3}]},
            "a message whose content is neither text nor a list of parts",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": "{"}, "tools are not valid JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": "3"}, "tools are not a list"),
        ({"messages": [QUESTION, ANSWER], "chat_template_kwargs": "x"}, "chat_template_kwargs is not a dict"),
        ({"prompt": "hello", "completion": [ANSWER]}, "prompt is a text but completion is not"),
        ({"prompt": [QUESTION], "completion": [QUESTION]}, "no assistant turn"),
        ({"prompt": 3, "completion": "x"}, "messages are not a list of role and content"),
        ({"text": ""}, "empty text"),
        ({"text": 3}, "text is not a text"),
        ({"input_ids": []}, "no tokens"),
        ({"input_ids": ["a"]}, "input_ids is not a list of token ids"),
        ({"input_ids": [[1, 2]]}, "input_ids is not a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels are not as long as input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask is not as long as input_ids"),
    ],
)
def test_a_broken_row_is_dropped_with_its_reason(byte_level, rules, row, expected):
    assert reason(row, byte_level(), rules()) == expected


def test_an_empty_prompt_is_dropped(byte_level, on_policy):
    assert reason({"prompt": ""}, byte_level(), on_policy()) == "empty prompt"


def test_a_row_that_the_template_refuses_is_dropped(byte_level, rules, on_policy):
    tokenizer = byte_level(REFUSING)
    for row, row_rules in (
        ({"messages": [QUESTION, ANSWER]}, rules()),
        ({"prompt": [QUESTION]}, on_policy()),
    ):
        assert reason(row, tokenizer, row_rules) == "refused by the chat template (roles must alternate)"

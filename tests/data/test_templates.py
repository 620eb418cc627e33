"""Conversations under the chat templates of many models: the tokens trained on, and the prompts of completions."""

from dataclasses import replace

import pytest

from gkd_trainer.batch_keys import PROMPT_IDS
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.tokens import RowDropped
from gkd_trainer.types import prompt_length
from tests.data.templates import ANSWER, CHATS
from tests.data.test_turns import trained_runs

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 2}}}
WITH_TOOL = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "multiply", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def conversation(chat):
    system = [{"role": "system", "content": "You are helpful."}] if chat.takes_system else []
    return [
        *system,
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello, how are you?"},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
    ]


@pytest.fixture(params=CHATS)
def chat(request):
    return CHATS[request.param]


@pytest.fixture
def prepare(chat_tokenizer, rules):
    """Prepare a row with a chat's tokenizer and stop tokens; returns the tokenizer too."""

    def prepare(chat, row, **changes):
        tokenizer = chat_tokenizer(chat)
        stop_ids = frozenset(tokenizer.convert_tokens_to_ids(list(chat.stops)))
        return RowPreparer.create(tokenizer, rules(**{"stop_ids": stop_ids, **changes}), None).prepare(row), tokenizer

    return prepare


def prompt_of(row):
    return row.prompt_ids or row.input_ids[: prompt_length(row.labels)]


def test_each_answer_is_trained_on_with_its_stop_token_and_nothing_else(chat, prepare):
    row, tokenizer = prepare(chat, {"messages": conversation(chat)})
    assert trained_runs(tokenizer, row.labels) == [
        chat.turn.replace(ANSWER, "hello, how are you?"),
        chat.last_turn.replace(ANSWER, "Paris."),
    ]


def test_a_model_that_stops_at_its_templates_end_of_turn_is_not_warned_about(chat, prepare):
    assert prepare(chat, {"messages": conversation(chat)})[0].unended == ""


def test_the_tokens_before_the_last_trained_run_lack_the_answer(chat, prepare):
    row, tokenizer = prepare(chat, {"messages": conversation(chat)})
    prompt = tokenizer.decode(row.input_ids[: prompt_length(row.labels)])
    assert prompt.endswith(chat.header)
    assert "capital of France?" in prompt
    assert "Paris" not in prompt


def test_only_the_last_turn_is_one_run(chat, prepare):
    row, tokenizer = prepare(chat, {"messages": conversation(chat)}, train_on="last_turn")
    assert trained_runs(tokenizer, row.labels) == [chat.last_turn.replace(ANSWER, "Paris.")]


def test_a_context_that_ends_with_an_answer_takes_no_range_from_the_turn_after_it(prepare):
    # TRL's template for Phi-3 marks the eos behind an answer that comes last.
    row = {"prompt": WITH_TOOL[:1] + WITH_TOOL[3:], "completion": [{"role": "assistant", "content": "five"}]}
    prepared, tokenizer = prepare(CHATS["phi3"], row)
    assert trained_runs(tokenizer, prepared.labels) == ["five<|end|>"]


def test_a_turn_that_is_marked_in_parts_is_one_run(byte_level, rules):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ 'one' }}{% endgeneration %}{{ ', two' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    row = RowPreparer.create(tokenizer, rules(), None).prepare({"messages": WITH_TOOL[:1] + WITH_TOOL[3:]})
    assert trained_runs(tokenizer, row.labels) == ["one, twofour<|im_end|>"]


def test_a_marked_generation_prompt_takes_no_range_from_its_turn(byte_level, rules):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ 'one two' + m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ 'one two' }}{% endgeneration %}{% endif %}"
    )
    tokenizer = byte_level(template)
    messages = [*WITH_TOOL[:1], *WITH_TOOL[3:]] * 2
    row = RowPreparer.create(tokenizer, rules(), None).prepare({"messages": messages})
    assert trained_runs(tokenizer, row.labels) == ["four<|im_end|>", "four<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        (
            "gpt-oss",
            ' to=functions.multiply<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>four<|return|>",
        ),
        (
            "qwen2.5",
            '<tool_call>\n{"name": "multiply", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            "four<|im_end|>",
        ),
    ],
    ids=["gpt-oss", "qwen2.5"],
)
def test_the_header_is_not_trained_on_where_later_turns_rewrite_a_tool_call(prepare, name, call, answer):
    messages = [dict(message) for message in WITH_TOOL]
    if name == "gpt-oss":
        messages[1]["thinking"] = "five six"  # left out once an answer follows
    row, tokenizer = prepare(CHATS[name], {"messages": messages, "tools": TOOLS})
    assert "five six" not in tokenizer.decode(row.input_ids)
    assert trained_runs(tokenizer, row.labels) == [call, answer]


def test_the_prompt_is_the_one_at_inference_in_any_format(chat, prepare):
    messages = conversation(chat)
    row, tokenizer = prepare(chat, {"messages": messages}, is_generating=True)
    expected = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt_of(row) == expected
    assert row.n_prompt == len(expected)
    completed, _ = prepare(chat, {"prompt": messages[:-1], "completion": messages[-1:]}, is_generating=True)
    assert prompt_of(completed) == expected
    alone, _ = prepare(chat, {"prompt": messages[:-1]}, is_generating=True, needs_completion=False)
    assert prompt_of(alone) == alone.input_ids == expected


def test_a_prompt_that_stands_in_the_row_is_not_kept_twice(prepare):
    row, _ = prepare(CHATS["smollm2"], {"messages": conversation(CHATS["smollm2"])}, is_generating=True)
    assert row.prompt_ids == []
    row, _ = prepare(CHATS["qwen3"], {"messages": conversation(CHATS["qwen3"])}, is_generating=False)
    assert row.prompt_ids == []


def test_the_prompt_has_the_tools_and_the_variables_of_the_row(prepare):
    options = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    row, tokenizer = prepare(CHATS["qwen3"], {"messages": WITH_TOOL, **options}, is_generating=True)
    expected = tokenizer.apply_chat_template(
        WITH_TOOL[:-1], tools=TOOLS, enable_thinking=False, add_generation_prompt=True
    )["input_ids"]
    assert prompt_of(row) == expected
    assert tokenizer.decode(expected).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])  # by markers, by prefixes
@pytest.mark.parametrize(
    "option",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"tokenize": True},
    ],
    ids=str,
)
def test_options_of_rendering_among_the_variables_of_a_row_change_nothing(prepare, name, option):
    chat = CHATS[name]
    for row in ({"messages": conversation(chat)}, {"prompt": conversation(chat)[:-1]}):
        changes = {"is_generating": True, "needs_completion": False}
        expected, _ = prepare(chat, row, **changes)
        assert prepare(chat, {**row, "chat_template_kwargs": option}, **changes)[0] == expected


REFUSE_AN_OPENING_ANSWER = ("gemma2", "gemma3", "qwen3.5", "mistral")


@pytest.mark.parametrize("has_system", [False, True], ids=["alone", "system"])
@pytest.mark.parametrize("name", [name for name in CHATS if name not in REFUSE_AN_OPENING_ANSWER])
def test_the_header_of_a_turn_that_opens_the_conversation_is_not_trained_on(prepare, name, has_system):
    chat = CHATS[name]
    opening = conversation(chat)[:1] if has_system else []
    messages = [*opening, {"role": "assistant", "content": "hello, how are you?"}, *conversation(chat)[-2:]]
    row, tokenizer = prepare(chat, {"messages": messages})
    assert trained_runs(tokenizer, row.labels) == [
        chat.turn.replace(ANSWER, "hello, how are you?"),
        chat.last_turn.replace(ANSWER, "Paris."),
    ]
    alone, _ = prepare(chat, {"messages": messages[: len(opening) + 1]}, is_generating=True)
    assert trained_runs(tokenizer, alone.labels) == [chat.last_turn.replace(ANSWER, "hello, how are you?")]
    assert tokenizer.decode(alone.input_ids[: prompt_length(alone.labels)]).endswith(chat.header)


def test_the_prompt_of_a_turn_that_opens_the_conversation_is_its_header(prepare):
    row, tokenizer = prepare(CHATS["qwen2.5"], {"messages": WITH_TOOL[3:]}, is_generating=True)
    assert row.prompt_ids == []
    assert tokenizer.decode(prompt_of(row)).endswith("<|im_start|>assistant\n")


def test_the_length_that_must_leave_room_is_that_of_the_prompt(prepare):
    chat = CHATS["r1-distill"]  # its generation prompt is two tokens longer than the header in the row
    row, _ = prepare(chat, {"messages": conversation(chat)}, is_generating=True)
    assert len(row.prompt_ids) == prompt_length(row.labels) + 2
    fitting = len(row.prompt_ids) + 8
    assert prepare(chat, {"messages": conversation(chat)}, is_generating=True, max_length=fitting)[0].prompt_ids
    with pytest.raises(RowDropped, match=rf"prompt longer.*\({fitting - 1} - 8\)") as dropped:
        prepare(chat, {"messages": conversation(chat)}, is_generating=True, max_length=fitting - 1)
    assert dropped.value.needed_length == fitting


def test_a_row_that_was_prepared_before_keeps_its_prompt(prepare):
    chat = CHATS["qwen3"]
    row, _ = prepare(chat, {"messages": conversation(chat)}, is_generating=True)
    again = {"input_ids": row.input_ids, "labels": row.labels, PROMPT_IDS: row.prompt_ids}
    assert prepare(chat, again, is_generating=True)[0] == row


USER, ASSISTANT = WITH_TOOL[0], WITH_TOOL[3]
CALL_WITH_TEXT = [USER, {**WITH_TOOL[1], "content": "five"}, *WITH_TOOL[2:]]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mistral", {"messages": [ASSISTANT, USER, ASSISTANT]}),
        ("olmo2", {"messages": [USER, ASSISTANT, ASSISTANT]}),
        ("gemma4", {"messages": CALL_WITH_TEXT, "tools": TOOLS}),
    ],
    ids=["opened by an answer", "two answers in a row", "a tool call with text"],
)
def test_a_conversation_whose_turns_are_not_found_is_dropped_if_ordinary_ones_are_found(prepare, name, row):
    with pytest.raises(RowDropped, match=r"can't be found without {% generation %} markers"):
        prepare(CHATS[name], row)


def test_a_conversation_that_loses_an_earlier_turn_is_kept_for_the_last_one(prepare):
    messages = [USER, ASSISTANT, ASSISTANT, USER, ASSISTANT]
    row, tokenizer = prepare(CHATS["olmo2"], {"messages": messages}, train_on="last_turn")
    assert trained_runs(tokenizer, row.labels) == ["four<|endoftext|>"]


def in_parts(text):
    return [{"type": "text", "text": piece} for piece in text.split("|")]


def test_text_parts_are_read_as_the_text_that_they_hold(chat, prepare):
    """Many templates for text write a list of parts as Python does, or leave it out."""
    given = [{"role": "user", "content": in_parts("hello| there")}, {"role": "assistant", "content": in_parts("fine")}]
    plain = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "fine"}]
    assert prepare(chat, {"messages": given})[0] == prepare(chat, {"messages": plain})[0]
    pair, plain_pair = ({"prompt": messages[:1], "completion": messages[1:]} for messages in (given, plain))
    assert prepare(chat, pair, is_generating=True)[0] == prepare(chat, plain_pair, is_generating=True)[0]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image"}, "hello"])
def test_a_part_that_is_not_a_text_drops_its_row_by_name(chat, prepare, part):
    row = {"prompt": [{"role": "user", "content": [*in_parts("hello"), part]}]}
    kind = part["type"] if isinstance(part, dict) else "str"
    with pytest.raises(RowDropped, match=f"a message with a part of type '{kind}', where only texts can be read"):
        prepare(chat, row, needs_completion=False)


AS_JSON = [
    {**message, "tool_calls": [{**CALL, "function": {**CALL["function"], "arguments": '{"a": 2}'}}]}
    if "tool_calls" in message
    else message
    for message in WITH_TOOL
]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwen3.5", "llama3.1", "gpt-oss", "gemma4", "nemotron3"])
def test_arguments_in_json_are_read_as_the_object_that_they_are(prepare, name):
    """OpenAI's form, which most templates would encode a second time, or refuse."""
    changes = {"is_generating": True, "needs_completion": False}
    for column, end in (("messages", None), ("prompt", 3)):
        in_json, as_object = ({column: messages[:end], "tools": TOOLS} for messages in (AS_JSON, WITH_TOOL))
        assert prepare(CHATS[name], in_json, **changes)[0] == prepare(CHATS[name], as_object, **changes)[0]


@pytest.mark.parametrize("messages", [AS_JSON, WITH_TOOL], ids=["json", "object"])
def test_a_template_that_refuses_objects_gets_arguments_in_json(prepare, messages):
    """DeepSeek's own; TRL's patch of it, which renders the turns that are trained on, takes objects."""
    row, tokenizer = prepare(CHATS["deepseek-v3"], {"messages": messages}, is_generating=True)
    for ids in (row.input_ids, prompt_of(row)):
        assert '```json\n{"a": 2}\n```' in tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["", None, ...])
def test_calls_are_trained_on_where_the_template_wants_none_for_a_content(prepare, content):
    messages = [dict(message) for message in WITH_TOOL]
    messages[1]["content"] = content
    if content is ...:
        del messages[1]["content"]
    row, tokenizer = prepare(CHATS["r1-distill"], {"messages": messages}, is_generating=True)
    assert "multiply" in tokenizer.decode(prompt_of(row))
    call, answer = trained_runs(tokenizer, row.labels)
    assert '<｜tool▁sep｜>multiply\n```json\n{"a": 2}\n```' in call
    assert answer == "four<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["llama3", "phi3", "phi3.5"])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_calls_that_the_template_leaves_out_drop_their_row(prepare, name, column):
    row = {column: WITH_TOOL if column == "messages" else WITH_TOOL[:3]}
    with pytest.raises(RowDropped, match=r"refused by the chat template \(it leaves out tool calls\)"):
        prepare(CHATS[name], row, needs_completion=False)


def test_rows_with_tools_are_trained_on_by_the_template_for_tools(prepare):
    chat = CHATS["qwen2.5"]  # TRL patches it
    for_tools = chat.template.replace("You may call one or more functions", "These functions may be called")
    assert for_tools != chat.template
    named = replace(chat, template={"default": chat.template, "tool_use": for_tools})
    for tools, template in ((TOOLS, for_tools), (None, chat.template)):
        row = {"messages": WITH_TOOL[:1] + WITH_TOOL[3:], "tools": tools}
        expected, _ = prepare(replace(chat, template=template), row, is_generating=True)
        assert prepare(named, row, is_generating=True)[0] == expected
        assert expected.prompt_ids == []  # the text that is trained on begins with the prompt

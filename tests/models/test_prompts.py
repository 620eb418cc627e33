"""Prompts in the ids of a tokenizer, as a model gets them."""

import json

import pytest

from gkd_trainer.models.prompts import leading_ids, prompt_ids, with_arguments, with_calls, writes_date

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("has_bos", [False, True])
def test_a_text_stands_behind_the_tokenizers_special_tokens_once(byte_level, has_bos):
    tokenizer = byte_level(has_bos=has_bos)
    bare = tokenizer("hello there", add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] * has_bos
    assert leading_ids(tokenizer) == tuple(bos)
    assert prompt_ids(tokenizer, "hello there") == bos + bare
    assert prompt_ids(tokenizer, "<s>hello there") == [tokenizer.bos_token_id, *bare]


def test_messages_are_rendered_with_the_header_of_the_next_turn(byte_level):
    tokenizer = byte_level(has_bos=True)  # which a template writes itself, if at all
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids(tokenizer, MESSAGES)) == text


def test_a_text_for_an_encoder_has_the_special_tokens_of_its_tokenizer(byte_level):
    tokenizer = byte_level(has_bos=True)
    assert prompt_ids(tokenizer, "hello", is_source=True) == tokenizer("hello")["input_ids"]
    assert prompt_ids(tokenizer, MESSAGES, is_source=True) == prompt_ids(tokenizer, MESSAGES)


def test_templates_get_tools_and_variables(byte_level):
    tokenizer = byte_level("{{ tools[0]['name'] }} {{ mood }} {{ messages[0]['content'] }}")
    ids = prompt_ids(tokenizer, MESSAGES, tools=[{"name": "sum"}], template_kwargs={"mood": "calm"})
    assert tokenizer.decode(ids) == "sum calm hello"


PARTS = [{"type": "text", "text": "hello"}, {"type": "text", "text": " there"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",
        # As those of vision-language models: nothing but lists is read.
        "{% for part in messages[0]['content'] if part is mapping %}{{ part['text'] }}{% endfor %}",
    ],
)
def test_text_parts_reach_a_template_in_the_form_that_it_reads(byte_level, template):
    tokenizer = byte_level(template)
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": PARTS}])) == "hello there"


def test_parts_that_are_not_text_are_refused(byte_level):
    with pytest.raises(ValueError, match="a part of type 'image', where only texts can be read"):
        prompt_ids(byte_level(), [{"role": "user", "content": [*PARTS, {"type": "image"}]}])


@pytest.mark.parametrize("arguments", ["", "[1]", "two", None, [1], {}])
@pytest.mark.parametrize("is_flat", [False, True])
def test_arguments_that_are_not_the_json_of_an_object_stay(arguments, is_flat):
    call = {"name": "sum", "arguments": arguments}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call if is_flat else {"function": call}]}]
    assert with_arguments(lambda given: given, messages) == messages


@pytest.mark.parametrize("calls", [None, "sum", [None], [{"function": "sum"}], [{"function": {"name": "sum"}}]])
def test_tool_calls_of_another_form_stay(calls):
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert with_arguments(lambda given: given, messages) == messages


def test_parts_that_a_template_reads_beside_texts_reach_it_but_no_images(byte_level):
    tokenizer = byte_level(
        "{% for part in messages[0]['content'] %}{{ '(' + part['thinking'] + ')' if part['type'] == 'thinking' "
        "else part['text'] }}{% endfor %}"
    )
    thought = {"type": "thinking", "thinking": "well"}
    assert (
        tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": [thought, *PARTS]}])) == "(well)hello there"
    )
    with pytest.raises(ValueError, match="a part of type 'thinking'"):
        prompt_ids(byte_level(), [{"role": "user", "content": [thought, *PARTS]}])
    with pytest.raises(ValueError, match="a part of type 'image_url'"):
        prompt_ids(tokenizer, [{"role": "user", "content": [{"type": "image_url"}, *PARTS]}])


@pytest.mark.parametrize("form", [str, json.loads], ids=["json", "object"])
def test_a_template_that_prints_or_refuses_objects_gets_their_json(byte_level, form):
    arguments = '{"city": "Köln", "metric": true}'
    call = {"function": {"name": "weather", "arguments": form(arguments)}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for template in (
        "{{ messages[1].tool_calls[0].function.arguments }}",
        "{{ messages[1].tool_calls[0].function.arguments | tojson }}",
        "{{ '' + messages[1].tool_calls[0].function.arguments }}",
    ):
        tokenizer = byte_level(template)
        assert tokenizer.decode(prompt_ids(tokenizer, messages)) == arguments


@pytest.mark.parametrize("is_printed", [False, True])
def test_what_python_prints_in_another_message_does_not_change_the_form_of_arguments(byte_level, is_printed):
    arguments = {"city": "Paris"}
    call = {"function": {"name": "weather", "arguments": arguments}}
    shown = {"role": "tool", "content": f"weather(**{arguments}) -> sunny"}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}, shown]
    form = "" if is_printed else " | tojson"
    template = "{{ messages[1].tool_calls[0].function.arguments" + form + " }} {{ messages[2].content }}"
    tokenizer = byte_level(template)
    written = tokenizer.decode(prompt_ids(tokenizer, messages))
    assert written == f'{{"city": "Paris"}} {shown["content"]}'


CALL = {"id": "functions.sum:0", "function": {"name": "sum", "arguments": {"a": 2}}}


def calling(content):
    return [
        *MESSAGES,
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ]


def writing(call, *, last_only=False):
    """A template that writes contents, and calls as given."""
    shown = f"{{% for c in m.tool_calls %}}{call}{{% endfor %}}"
    if last_only:
        shown = f"{{% if loop.last %}}{shown}{{% endif %}}"
    return "{% for m in messages %}{{ m.content or '' }}" + shown + "{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        writing("{{ c.function.name }}"),
        writing("{{ c.id }}"),  # as Kimi K2's, which writes no name
        writing("{{ c.function.name | upper }}"),
        writing("{{ c.function.name }}", last_only=True),
        "{% for m in messages %}{{ '' + m.content[0] }}{% endfor %}",  # refuses an empty content
    ],
    ids=["name", "id", "another form", "not in earlier turns", "refusing"],
)
def test_calls_that_a_template_writes_in_any_form_or_refuses_stay_as_they_are(byte_level, template):
    assert with_calls(byte_level(template), calling(""), None, {}) == calling("")


def test_an_empty_content_becomes_none_where_calls_would_be_left_out(byte_level):
    tokenizer = byte_level(
        "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert with_calls(tokenizer, calling(""), None, {}) == calling(None)
    assert tokenizer.decode(prompt_ids(tokenizer, calling(""))) == "hellosum4"
    with pytest.raises(ValueError, match="it leaves out tool calls beside a text"):
        with_calls(tokenizer, calling("well"), None, {})


def test_calls_that_a_template_never_writes_are_refused(byte_level):
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", writing("")):
        with pytest.raises(ValueError, match=r"it leaves out tool calls$"):
            prompt_ids(byte_level(template), calling(""))


def test_calls_are_looked_for_with_the_rows_tools_and_variables(byte_level):
    tokenizer = byte_level(writing("{{ c.function.name if tools and shows }}"))
    assert with_calls(tokenizer, calling(""), [{"name": "sum"}], {"shows": True}) == calling("")
    with pytest.raises(ValueError, match="leaves out"):
        with_calls(tokenizer, calling(""), None, {})


def test_a_call_without_the_key_function_has_its_arguments_read_too():
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": '{"a": null}'}]}]
    assert with_arguments(lambda given: json.dumps(given[0]["tool_calls"][0]["arguments"]), messages) == '{"a": null}'


@pytest.mark.parametrize(
    ("template", "variables", "is_written"),
    [
        ("{{ strftime_now('%Y') }}", {}, True),
        ("{{ date_string or strftime_now('%Y') }}", {}, True),
        ("{{ date_string or strftime_now('%Y') }}", {"date_string": "26 Jul 2024"}, False),
        ("{% if messages[0]['role'] == 'tool' %}{{ strftime_now('%Y') }}{% endif %}", {}, False),
        ("{{ raise_exception('strftime_now') }}", {}, False),
        ("{{ messages[0]['content'] }}", {}, False),
        (None, {}, False),
    ],
)
def test_a_template_writes_the_date_if_it_asks_for_it_with_these_variables(byte_level, template, variables, is_written):
    assert writes_date(byte_level(template), variables) is is_written
    assert not writes_date(None, variables)

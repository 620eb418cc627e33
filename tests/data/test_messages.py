"""Messages, tools and template variables, read from a row's columns."""

import json

import pytest

from gkd_trainer.data.messages import messages_of, template_kwargs_of, tools_of
from gkd_trainer.data.tokens import RowDropped

TOOLS = [{"name": "search"}, {"name": "count"}]


def test_roles_get_their_usual_names_in_a_copy():
    given = [{"role": "human", "content": "hello"}, {"role": "gpt", "content": "you"}, {"role": "tool", "content": "1"}]
    assert [message["role"] for message in messages_of(given)] == ["user", "assistant", "tool"]
    assert given[0]["role"] == "human"


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content", "thinking"])
def test_a_message_with_other_parts_needs_no_content(name):
    assert messages_of([{"role": "assistant", name: "any"}]) == [{"role": "assistant", name: "any", "content": ""}]
    with pytest.raises(RowDropped, match="a message without content"):
        messages_of([{"role": "assistant", "name": "any"}])


@pytest.mark.parametrize("encode", [lambda tools: tools, json.dumps, lambda tools: [*map(json.dumps, tools)]])
def test_tools_may_be_json_all_at_once_or_one_by_one(encode):
    assert tools_of({"tools": encode(TOOLS)}) == TOOLS


@pytest.mark.parametrize("row", [{}, {"tools": None}, {"tools": []}, {"tools": ""}, {"tools": "[]"}])
def test_a_row_without_tools_has_none(row):
    assert tools_of(row) is None


def test_variables_of_the_template_come_without_the_options_of_rendering():
    given = {"enable_thinking": False, "add_generation_prompt": True, "tokenize": True, "continue_final_message": True}
    assert template_kwargs_of({"chat_template_kwargs": given}) == {"enable_thinking": False}
    assert template_kwargs_of({"chat_template_kwargs": None}) == template_kwargs_of({}) == {}

"""A row's messages, tools and variables for its chat template, read from its columns and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl.data_utils import is_conversational

from gkd_trainer.data.tokens import RowDropped
from gkd_trainer.models.prompts import with_texts

_CONVERSATION_ROLES = {"human": "user", "gpt": "assistant"}

# Options of rendering that we set, not variables of a template. Rows made for inference may set them.
_RENDERING_OPTIONS = frozenset(("add_generation_prompt", "continue_final_message", "tokenize"))


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Return messages with the usual role names.

    Raises:
        RowDropped: `value` is not a list of messages.

    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowDropped("messages are not a list of role and content")
    if not value:
        raise RowDropped("no messages")
    if not is_conversational({"messages": value}):
        raise RowDropped("a message without role")
    messages = []
    for message in value:
        if not isinstance(message.get("role"), str):
            raise RowDropped("a message without role")
        if "content" not in message:
            if not any(key in message for key in ("tool_calls", "reasoning_content", "thinking")):
                raise RowDropped("a message without content")
            message = {**message, "content": ""}  # A template that reads `content` would fail without it.
        if not isinstance(message["content"], (str, list)):
            raise RowDropped("a message whose content is neither text nor a list of parts")
        messages.append({**message, "role": _CONVERSATION_ROLES.get(message["role"], message["role"])})
    return messages


def has_messages(row: Mapping[str, Any]) -> bool:
    """Return whether a row holds messages to be rendered, and no tokens, which are read in their place."""
    columns = ("messages", "conversations", "prompt")
    return row.get("input_ids") is None and any(isinstance(row.get(column), list) for column in columns)


def texts_of(value: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return messages as `messages_of` does, with texts as their contents in place of lists of text parts.

    Raises:
        RowDropped: `value` is not a list of messages, or one has a part that is not a text.

    """
    try:
        return with_texts(tokenizer, messages_of(value))
    except ValueError as error:
        raise RowDropped(str(error)) from None


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools that a row's messages may call, or None if it has none.

    Raises:
        RowDropped: They are neither a list nor JSON of one.

    """
    tools = row.get("tools")
    if not tools:
        return None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools, list):
            raise RowDropped("tools are not a list")
        return [json.loads(tool) if isinstance(tool, str) else tool for tool in tools] or None
    except json.JSONDecodeError:
        raise RowDropped("tools are not valid JSON") from None


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables that a row sets for the chat template.

    Raises:
        RowDropped: They are not a dict.

    """
    template_kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(template_kwargs, dict):
        raise RowDropped("chat_template_kwargs is not a dict")
    return {name: value for name, value in template_kwargs.items() if name not in _RENDERING_OPTIONS}

"""A prompt, as text or messages, in the token ids of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jinja2 import TemplateError

T = TypeVar("T")

RENDERING_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a chat template raises for messages that it refuses or does not understand."""

_PROBE = {"argument": "5d41402abc4b2a76"}
"""Arguments of a tool call that no text contains, as Python prints them."""


def prompt_ids(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    is_source: bool = False,
) -> list[int]:
    """Return the token ids of a prompt that a model is to continue.

    Args:
        tokenizer: The model's tokenizer; for messages, with a chat template.
        prompt: A text, which is used as is after the tokenizer's special tokens such as bos; or messages, which
            the template renders with the header of the next turn.
        tools: The tools that the template describes, if any.
        template_kwargs: Further variables of the template.
        is_source: Whether the encoder of an encoder-decoder reads it: a text then has all special tokens of the
            tokenizer, such as the eos after it.

    Raises ValueError for messages with a part that is not a text or tool calls that the template leaves out, and what
    the template raises.
    """
    if isinstance(prompt, str) and is_source:
        return list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if isinstance(prompt, str):
        ids = _encoded(tokenizer, prompt)
        leading = leading_ids(tokenizer)
        return ids if tuple(ids[: len(leading)]) == leading else [*leading, *ids]
    template_kwargs = template_kwargs or {}
    messages = with_calls(tokenizer, with_texts(tokenizer, prompt), tools, template_kwargs)
    return _encoded(tokenizer, render_prompt(tokenizer, messages, tools, template_kwargs))


def render_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, template_kwargs: Mapping[str, Any]
) -> str:
    """Render the model's prompt for the next turn, with the tokenizer's own template."""

    def render(given: list[Any]) -> str:
        text: str = tokenizer.apply_chat_template(
            given, tools=tools or None, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return text

    return with_arguments(render, messages)


def with_arguments(
    render: Callable[[list[Any]], T], messages: Sequence[Mapping[str, Any]], text_of: Callable[[T], str] = str
) -> T:
    """Return what `render` makes of messages whose tool calls have objects as arguments, not their JSON.

    OpenAI's format has the JSON, but most templates write it themselves. One that refuses objects, or prints them as
    Python does, gets the JSON, whichever the messages have.

    Args:
        render: Renders messages.
        messages: The messages, whose tool calls' arguments may be either.
        text_of: Returns the text of what `render` makes; by default it is one.
    """
    objects: list[dict[str, Any]] = []

    def as_object(arguments: Any) -> Any:
        parsed = _parsed(arguments)
        if isinstance(parsed, dict):
            objects.append(parsed)
        return parsed

    given = [_with_arguments_as(as_object, message) for message in messages]
    if not objects:
        return render(given)
    as_json = [_with_arguments_as(_json_of, message) for message in messages]
    try:
        rendered = render(given)
    except RENDERING_ERRORS:
        return render(as_json)
    text = text_of(rendered)
    if not any(arguments and str(arguments) in text for arguments in objects):
        return rendered
    # What Python prints may stand in another message: arguments that no text contains tell who wrote it.
    probe = [_with_arguments_as(lambda arguments: _PROBE if _is_object(arguments) else arguments, m) for m in messages]
    try:
        is_printed = str(_PROBE) in text_of(render(probe))
    except RENDERING_ERRORS:
        is_printed = False
    return render(as_json) if is_printed else rendered


def with_calls(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, template_kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return messages in a form in which the tokenizer's template writes their tool calls.

    Most templates write them beside any content; DeepSeek-R1-Distill's only if that is None, as in OpenAI's format,
    where others would write "None". So an empty content becomes None where the calls would be left out otherwise.

    Raises ValueError for calls that the template leaves out in any form.
    """
    hello = {"role": "user", "content": "Hello"}
    context = next((dict(message) for message in messages if message.get("role") == "user"), hello)

    def writes_calls(message: dict[str, Any]) -> bool | None:
        """Return whether the calls change what is written; None if the template refuses the message."""
        bare = {name: value for name, value in message.items() if name != "tool_calls"}
        texts: list[str | None] = []
        for answer in (message, bare):
            try:
                texts.append(render_prompt(tokenizer, [context, answer], tools, template_kwargs))
            except RENDERING_ERRORS:
                texts.append(None)
        return None if texts[0] is None else texts[0] != texts[1]

    copies = [dict(message) for message in messages]
    calling = [message for message in copies if message.get("role") == "assistant" and message.get("tool_calls")]
    for is_empty in (True, False):
        alike = [message for message in calling if is_empty is not bool(message.get("content"))]
        is_written = not alike or writes_calls(alike[0])
        if is_written:
            continue
        if is_empty and writes_calls({**alike[0], "content": None}):
            for message in alike:
                message["content"] = None
        elif is_written is False:
            raise ValueError("it leaves out tool calls" if is_empty else "it leaves out tool calls beside a text")
    return copies


def with_texts(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a model that reads only text, in a form that the tokenizer's template reads.

    A list of text parts becomes one text: most templates for text write such a list as Python does, or nothing at all.
    It stays for a template that reads nothing but lists, and beside other parts such as Magistral's "thinking" for one
    that reads lists.

    Raises ValueError for an image or a sound, and for any other part that is not a text if the template reads no lists.
    """
    copies = [dict(message) for message in messages]
    others = {kind for message in copies for kind in _other_kinds(message.get("content"))}
    refused = {kind for kind in others if kind == "str" or any(medium in kind for medium in _MEDIA)}
    if others and not refused and not _shows(tokenizer, [{"type": "text", "text": "Hello"}]):
        refused = others
    if refused:
        raise ValueError(f"a message with a part of type {min(refused)!r}, where only texts can be read")
    has_lists = any(isinstance(message.get("content"), list) for message in copies)
    if others or not has_lists or not _shows(tokenizer, "Hello"):
        return copies
    return [{**message, "content": _joined(message.get("content"))} for message in copies]


def writes_date(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> bool:
    """Return whether a chat template writes today's date into a conversation with these variables."""
    templates = getattr(tokenizer, "chat_template", None)
    template = templates.get("default") if isinstance(templates, dict) else templates
    if not isinstance(template, str) or "strftime_now" not in template:
        return False

    def renders(tried: str) -> bool:
        message = {"role": "user", "content": "Hello"}
        try:
            tokenizer.apply_chat_template([message], chat_template=tried, tokenize=False, **template_kwargs)
        except RENDERING_ERRORS:
            return False
        return True

    return renders(template) and not renders(template.replace("strftime_now", "raise_exception"))


def leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text, such as bos."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for n_leading in range(len(ids) - len(bare) + 1):
        if ids[n_leading : n_leading + len(bare)] == bare:
            return tuple(ids[:n_leading])
    return ()


def _with_arguments_as(form: Callable[[Any], Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its tool calls' arguments in another form."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    return {**message, "tool_calls": [_call_with_arguments_as(form, call) for call in calls]}


def _call_with_arguments_as(form: Callable[[Any], Any], call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _call_with_arguments_as(form, call["function"])}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _parsed(arguments: Any) -> Any:
    """Return arguments as an object if they are the JSON of one."""
    try:
        parsed = json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _is_object(arguments: Any) -> bool:
    return isinstance(_parsed(arguments), dict)


def _json_of(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


_MEDIA = ("image", "video", "audio")
"""What is in the names of parts that hold media, such as image_url and input_audio."""


def _other_kinds(content: Any) -> list[str]:
    """Return the types of a content's parts that are not texts; "str" stands for a part that is not an object."""
    found = []
    for part in content if isinstance(content, list) else ():
        kind = str(part.get("type")) if isinstance(part, Mapping) else "str"
        if kind != "text" or not isinstance(part.get("text"), str):
            found.append(kind)
    return found


def _joined(content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _shows(tokenizer: Any, content: Any) -> bool:
    """Return whether a template writes the text "Hello" of a content, and not as Python writes a list."""
    try:
        rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except RENDERING_ERRORS:
        return isinstance(content, str)
    return "Hello" in rendered and "'type'" not in rendered


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

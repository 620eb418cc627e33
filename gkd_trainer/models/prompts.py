"""A prompt, as text or messages, in the token ids of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
    """
    if isinstance(prompt, str) and is_source:
        return list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if isinstance(prompt, str):
        ids = _encoded(tokenizer, prompt)
        leading = leading_ids(tokenizer)
        return ids if tuple(ids[: len(leading)]) == leading else [*leading, *ids]
    text = tokenizer.apply_chat_template(
        [dict(message) for message in prompt],
        tools=tools or None,
        tokenize=False,
        add_generation_prompt=True,
        **(template_kwargs or {}),
    )
    return _encoded(tokenizer, text)


def leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text, such as bos."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for n_leading in range(len(ids) - len(bare) + 1):
        if ids[n_leading : n_leading + len(bare)] == bare:
            return tuple(ids[:n_leading])
    return ()


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

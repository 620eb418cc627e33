"""The prompt that a teacher with another tokenizer reads: rendered by its own chat template, in its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import maybe_convert_to_chatml

from gkd_trainer.data.messages import template_kwargs_of, texts_of, tools_of
from gkd_trainer.data.tokens import RowDropped
from gkd_trainer.models.prompts import RENDERING_ERRORS, render_prompt, with_calls


@dataclass(frozen=True)
class RenderedPrompts:
    """Renders prompts with the template of `tokenizer`, the teacher's; can be pickled."""

    tokenizer: Any

    def of(self, row: Mapping[str, Any], *, is_generating: bool = False) -> list[int]:
        """Return the tokens before a row's last assistant turn.

        If `is_generating`, a conversation that ends with another's turn is a prompt as a whole. Empty for a row without
        messages, and if there is no template: the teacher then reads the student's prompt.

        Raises:
            RowDropped: The template refuses the messages.
        """
        messages = [] if self.tokenizer.chat_template is None else _prompt_of(row, self.tokenizer, is_generating)
        if not messages:
            return []
        tools, template_kwargs = tools_of(row), template_kwargs_of(row)
        try:
            messages = with_calls(self.tokenizer, messages, tools, template_kwargs)
            text = render_prompt(self.tokenizer, messages, tools, template_kwargs)
        except RENDERING_ERRORS as error:
            raise RowDropped(f"refused by the teacher's chat template ({str(error)[:100]})") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _prompt_of(row: Mapping[str, Any], tokenizer: Any, is_generating: bool) -> Sequence[dict[str, Any]]:
    if row.get("input_ids") is not None:
        return []
    if row.get("messages") is not None or row.get("conversations") is not None:
        held = {name: row[name] for name in ("messages", "conversations") if row.get(name) is not None}
        messages = texts_of(maybe_convert_to_chatml(held)["messages"], tokenizer)
        n_context = 0
    elif isinstance(row.get("prompt"), list):
        held = {name: row[name] for name in ("prompt", "completion") if isinstance(row.get(name), list)}
        converted = maybe_convert_to_chatml(held)
        messages = texts_of(converted["prompt"], tokenizer)
        n_context = len(messages)
        messages += texts_of(converted["completion"], tokenizer) if "completion" in converted else []
    else:
        return []
    if is_generating and messages[-1]["role"] != "assistant":
        return messages  # a completion follows the user's or the tool's last word
    turns = [place for place in range(n_context, len(messages)) if messages[place]["role"] == "assistant"]
    return messages[: turns[-1]] if turns else messages

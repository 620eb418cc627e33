"""Find the assistant's turns in a rendered conversation, and the tokens they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import apply_chat_template

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.errors import GKDDataError
from gkd_trainer.models.prompts import with_arguments

Span = tuple[int, int]
"""A half-open range: of characters in a text, or of tokens in a sequence."""

_ORDINARY_CONVERSATION = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
)


class TurnsNotFound(Exception):  # noqa: N818 (a verdict on one conversation; never seen by a caller of the package)
    """The template has no generation markers, and does not preserve this conversation's prefixes."""


def marked_template(tokenizer: Any) -> str | None:
    """Return TRL's patch of the tokenizer's chat template with generation markers; None if TRL has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except Exception:  # TRL tries the template on a conversation with tools, and templates raise anything.
        return None
    return template


def render_turns(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    n_context: int,
    is_last_only: bool,
    patched_template: str | None,
    tools: list[Any] | None,
    template_kwargs: Mapping[str, Any],
) -> tuple[str, list[Span]]:
    """Render a conversation and find the assistant turns to train on.

    Args:
        tokenizer: holds the chat template.
        messages: the conversation.
        n_context: number of messages at its start that are context and not trained on.
        is_last_only: whether only the last assistant turn is trained on.
        patched_template: `marked_template(tokenizer)`.
        tools: passed to the template as `tools`.
        template_kwargs: further variables for the template.

    Returns:
        The text, and one range of characters per turn trained on, in order. A range goes from the first character of
        the turn that the model generates to the last one that belongs to it in the template.

    Raises:
        TurnsNotFound: the turns of this conversation can't be found, but those of an ordinary one can.
        GKDDataError: the template has no generation markers and does not preserve prefixes.

    """
    conversation = _Conversation(tokenizer, messages, tools, template_kwargs)
    turns = conversation.assistant_turns(n_context, is_last_only)
    own_template = tokenizer.get_chat_template(None, tools)
    if has_generation_markers(own_template):
        return conversation.by_markers(own_template, turns)
    # TRL patches the template of rows without tools, which may be another.
    if patched_template is not None and own_template == tokenizer.get_chat_template(None, None):
        return conversation.by_markers(patched_template, turns)
    try:
        return conversation.by_prefixes(turns)
    except TurnsNotFound:
        ordinary = _Conversation(tokenizer, _ORDINARY_CONVERSATION, None, {})
        if ordinary.preserves_prefixes(is_last_only):
            raise
        remedy = "give the tokenizer a chat template with {% generation %} markers around assistant turns"
        if ordinary.preserves_prefixes(is_last_only=True):
            remedy += ', or set train_on="last_turn"'
        raise GKDDataError(
            "expected a chat template that has {% generation %} markers or preserves prefixes (the text "
            "of all messages begins with the text of the first ones); this one rewrites "
            "earlier turns or its own generation prompt, so the assistant's turns can't be found: "
            f"{remedy}"
        ) from None


def encode_spans(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Tokenise a text so that each span gets its own tokens, as if generated after the text before it.

    A tokenizer that would read the text differently in pieces (such as one that puts a space before each text)
    reads it in one piece; a token that partly belongs to a span then belongs to it.

    Returns:
        The token ids without special tokens added, and the range of tokens of each span.

    """
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces: list[int] = []
    ranges: list[Span] = []
    position = 0
    for start, end in spans:
        pieces += _encode(tokenizer, text[position:start])
        first = len(pieces)
        pieces += _encode(tokenizer, text[start:end])
        ranges.append((first, len(pieces)))
        position = end
    pieces += _encode(tokenizer, text[position:])
    if pieces == whole or _decode(tokenizer, pieces) == _decode(tokenizer, whole):
        return pieces, ranges
    return list(whole), _ranges_by_offsets(tokenizer, text, spans)


def turn_labels(ids: Sequence[int], ranges: Sequence[Span], stop_ids: Collection[int]) -> list[int]:
    """Return labels that train each range of tokens up to and including its stop token.

    The stop token is the first in the range or, if it holds none, the one right after it. Text that a template
    writes after it is never generated, and so not trained on.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in ranges:
        stop = _stop_of(ids, (start, end), stop_ids)
        end = end if stop is None else stop + 1
        labels[start:end] = ids[start:end]
    return labels


def without_stop(ids: Sequence[int], ranges: Sequence[Span], stop_ids: Collection[int]) -> list[Span]:
    """Return the non-empty ranges in which `turn_labels` finds no stop token."""
    return [(start, end) for start, end in ranges if start < end and _stop_of(ids, (start, end), stop_ids) is None]


def ended_at(tokenizer: Any, ids: Sequence[int], span: Span, end_ids: Collection[int]) -> Span:
    """Return a range of tokens without trailing white space if one of `end_ids` precedes that, else unchanged."""
    start, end = span
    while start < end and ids[end - 1] not in end_ids and not _decode(tokenizer, [ids[end - 1]]).strip():
        end -= 1
    return (start, end) if start < end and ids[end - 1] in end_ids else span


class _Conversation:
    """A conversation that can be rendered in part."""

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.messages = list(messages)
        self.tools = tools
        self.template_kwargs = template_kwargs

    def assistant_turns(self, n_context: int, is_last_only: bool) -> list[int]:
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and i >= n_context]
        return turns[-1:] if is_last_only else turns

    def by_markers(self, template: str, turns: Sequence[int]) -> tuple[str, list[Span]]:
        text, marked = self._render_marked(template, self.messages)
        # The model's prompt for each turn.
        prompts = [self._render_marked(template, self._before(turn), add_generation_prompt=True) for turn in turns]
        # A template may mark several ranges in one turn (TRL's for Phi-3 marks the trailing eos separately): a turn
        # owns those that its prompt does not have yet, up to those of the next turn.
        n_before = [self._marked_before(template, turn, *prompt) for turn, prompt in zip(turns, prompts, strict=True)]
        spans = []
        for turn, (prompt, _), first, end in zip(turns, prompts, n_before, [*n_before[1:], len(marked)], strict=True):
            if own := marked[first:end]:
                span = own[0][0], own[-1][1]
                n_given = self._given(template, text, turn, prompt, span[0])
                # Templates also mark parts of the generation prompt (TRL's for Qwen2.5 the newline after the role, for
                # gpt-oss the whole header), which the model is given and does not generate.
                spans.append((n_given if span[0] < n_given <= span[1] else span[0], span[1]))
        return text, spans

    def _marked_before(self, template: str, turn: int, prompt: str, spans: list[Span]) -> int:
        """Return how many ranges are marked before a turn, excluding those of its generation prompt."""
        if spans and spans[-1][1] == len(prompt):
            return min(len(spans), len(self._render_marked(template, self._before(turn))[1]))
        return len(spans)

    def by_prefixes(self, turns: Sequence[int]) -> tuple[str, list[Span]]:
        text = self._render(self.messages)
        return text, [self._span_by_prefix(text, turn) for turn in turns]

    def preserves_prefixes(self, is_last_only: bool) -> bool:
        try:
            self.by_prefixes(self.assistant_turns(0, is_last_only))
        except TurnsNotFound:
            return False
        return True

    def _span_by_prefix(self, text: str, turn: int) -> Span:
        after = self._render(self.messages[: turn + 1])
        before = self._render(self.messages[:turn], add_generation_prompt=True) if turn else self._opening(after)
        if not after.startswith(before) or not text.startswith(after):
            raise TurnsNotFound
        return len(before), len(after)

    def _given(self, template: str, text: str, turn: int, prompt: str, start: int) -> int:
        """Return how much of the text the model is given as the prompt of a turn, 0 if unknown.

        `prompt` is the rendered prompt, and the marked part of the turn starts at `start`.
        """
        if turn > 0 and text.startswith(prompt):
            return len(prompt)
        # The text before the turn may differ from the prompt (gpt-oss drops earlier reasoning; a turn that opens the
        # conversation has nothing before it), and the prompt may go further than the turn (into reasoning that the data
        # lacks). So look for the header around the start of the marked part. Only whole tokens of it count: a single
        # character in common may belong to the content.
        context_ids = _encode(self.tokenizer, self._render(self._before(turn), chat_template=template))
        prompt_ids = _encode(self.tokenizer, prompt)
        n_common = next(
            (i for i, (a, b) in enumerate(zip(context_ids, prompt_ids, strict=False)) if a != b),
            min(len(context_ids), len(prompt_ids)),
        )
        header_ids = prompt_ids[n_common:]
        for n_shared in range(len(header_ids), 0, -1):
            shared = _decode(self.tokenizer, header_ids[:n_shared])
            at = text.rfind(shared, 0, start + len(shared))
            if at >= 0 and at + len(shared) > start:
                return at + len(shared)
        return 0

    def _opening(self, rendered: str) -> str:
        """Return the text before the content of an assistant turn that opens the conversation."""
        before = self._before(0)
        header = self._render(before, add_generation_prompt=True).removeprefix(self._render(before))
        if not header or header not in rendered:
            raise TurnsNotFound
        return rendered[: rendered.index(header) + len(header)]

    def _before(self, turn: int) -> list[Mapping[str, Any]]:
        """Return the messages before a turn.

        Templates can't render an empty list, and end a lone assistant turn differently from a user's. So a turn that
        opens the conversation is preceded by a user's turn with the same content.
        """
        return self.messages[:turn] or [{"role": "user", "content": self.messages[0]["content"] or ""}]

    def _render(self, messages: list[Mapping[str, Any]], **options: Any) -> str:
        def render(given: list[Any]) -> str:
            row: dict[str, Any] = {"messages": given, "chat_template_kwargs": self.template_kwargs}
            text: str = apply_chat_template(row, self.tokenizer, self.tools, **options)["text"]
            return text

        return with_arguments(render, messages)

    def _render_marked(
        self, template: str, messages: list[Mapping[str, Any]], **options: Any
    ) -> tuple[str, list[Span]]:
        # The tokenizer's own `apply_chat_template` gives a mask over the tokens of the text as one piece; with the
        # ranges of characters behind that mask, `encode_spans` can choose the tokens.
        def render(given: list[Any]) -> Any:
            return render_jinja_template(
                conversations=[given],
                tools=self.tools or None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.template_kwargs, **options},
            )

        texts, spans = with_arguments(render, messages, lambda rendered: rendered[0][0])
        return texts[0], [(start, end) for start, end in spans[0]]


def _stop_of(ids: Sequence[int], span: Span, stop_ids: Collection[int]) -> int | None:
    start, end = span
    stop = next((i for i in range(start, end) if ids[i] in stop_ids), None)
    if stop is None and start < end < len(ids) and ids[end] in stop_ids:
        return end
    return stop


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _ranges_by_offsets(tokenizer: Any, text: str, spans: Sequence[Span]) -> list[Span]:
    if not tokenizer.is_fast:
        raise GKDDataError(
            "expected a tokenizer that reads a text in pieces as it reads the whole text, or one that "
            f"gives character offsets; got the slow {type(tokenizer).__name__}: load its fast version"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ranges = []
    for start, end in spans:
        inside = [i for i, (s, e) in enumerate(encoding["offset_mapping"]) if s < end and max(e, s + 1) > start]
        ranges.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return ranges

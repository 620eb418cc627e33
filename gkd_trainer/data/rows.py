"""Turn one row in any of the usual formats into token ids and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import apply_chat_template, maybe_convert_to_chatml

from gkd_trainer.batch_keys import IGNORE_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.data.images import ImageProcessing, images_of, require_own, require_readable, with_image_parts
from gkd_trainer.data.messages import has_messages, messages_of, template_kwargs_of, texts_of, tools_of
from gkd_trainer.data.pairs import held_pair, text_pair, turn_pair
from gkd_trainer.data.rules import PreparedRow, RowRules, fitted, fitted_pair
from gkd_trainer.data.teacher_prompts import TEACHER_PROMPT, TeacherPrompts, has_teacher_prompts
from gkd_trainer.data.tokens import RowDropped, RowTokens, held_tokens, trains_on_all
from gkd_trainer.data.turns import (
    Span,
    TurnsNotFound,
    encode_spans,
    ended_at,
    marked_template,
    render_turns,
    turn_labels,
    without_stop,
)
from gkd_trainer.errors import GKDDataError
from gkd_trainer.models.prompts import (
    RENDERING_ERRORS,
    leading_ids,
    render_prompt,
    with_arguments,
    with_calls,
    writes_date,
)
from gkd_trainer.types import prompt_length

NEEDS_COMPLETION = (
    "a prompt without a completion gives nothing to train on: set lmbda=1.0 (the student completes each "
    "prompt) or seq_kd=True (the teacher does), or add completions"
)

NEEDS_PROMPT = (
    "expected a prompt in each row, since lmbda=1.0 generates every completion; got rows that are trained on from "
    "their first token (as `text` is): use `messages`, or `prompt` and `completion`, or lower lmbda"
)


def has_format(columns: Iterable[str], text_field: str = "text") -> bool:
    """Return whether rows with these columns are in a format that is read."""
    return not {"input_ids", "messages", "conversations", "prompt", text_field}.isdisjoint(columns)


def no_format(columns: Iterable[str], text_field: str = "text") -> str:
    """Return the error for rows in no format that is read."""
    return (
        f"expected rows with `messages`, `prompt` (and `completion`), `{text_field}`, or `input_ids` (and `labels`); "
        f"got the columns {sorted(columns)}: rename them"
    )


@dataclass(frozen=True)
class RowPreparer:
    """Turns rows into token ids and labels by one set of rules; can be pickled."""

    tokenizer: Any
    rules: RowRules
    formatting_func: Callable[[Any], Any] | None
    patched_template: str | None
    leading_ids: tuple[int, ...]
    added_ids: frozenset[int]
    teacher_prompts: TeacherPrompts
    images: ImageProcessing | None = None

    @classmethod
    def create(
        cls,
        tokenizer: Any,
        rules: RowRules,
        formatting_func: Callable[[Any], Any] | None,
        *,
        images: ImageProcessing | None = None,
        teacher_prompts: TeacherPrompts | None = None,
    ) -> RowPreparer:
        """Build a preparer; `tokenizer` None suffices for tokenised rows, `images` None for rows without images.

        `teacher_prompts` is by default rendered by the same tokenizer, and of any length.
        """
        if teacher_prompts is None:
            teacher_prompts = TeacherPrompts(tokenizer, is_encoder_decoder=rules.is_encoder_decoder)
        if tokenizer is None:
            return cls(None, rules, formatting_func, None, (), frozenset(), teacher_prompts)
        added_ids = frozenset(tokenizer.added_tokens_decoder)
        template, leading = marked_template(tokenizer), leading_ids(tokenizer)
        return cls(tokenizer, rules, formatting_func, template, leading, added_ids, teacher_prompts, images)

    def prepare(self, row: Mapping[str, Any]) -> PreparedRow:
        """Return the row's tokens.

        Raises:
            RowDropped: this row can't be used.
            GKDDataError: no row like this one can be used with these rules or this tokenizer.

        """
        images = images_of(row)
        require_readable(images, self.images, is_encoder_decoder=self.rules.is_encoder_decoder)
        formatted = row
        if self.formatting_func is not None:
            formatted = self._formatted(row)
            require_own(formatted, images)
        shown = _without_none({**_teachers_columns(row), **formatted})
        teacher_ids = self.teacher_prompts.ids_of(shown, is_generating=self.rules.is_generating)
        if images and teacher_ids:
            raise GKDDataError(
                "a row has images, but its teacher reads a prompt of its own (a teacher_prompt, or the row in another "
                "tokenizer's tokens), which has none: use a teacher that reads the row's tokens, or rows without images"
            )
        tokens = self._tokens(formatted, len(images))
        if self.rules.is_encoder_decoder:
            return fitted_pair(tokens, teacher_ids, self.rules, self.teacher_prompts)
        if self.images is not None:
            tokens = self.images.expanded(tokens, images, is_generating=self.rules.is_generating)
        return fitted(tokens, teacher_ids, self.rules, self.teacher_prompts, self.images)

    def has_teacher_prompt(self, row: Mapping[str, Any]) -> bool:
        """Return whether rows like this one may have prompts for the teacher; it may be None in this one."""
        return self.teacher_prompts.rendered is not None or has_teacher_prompts({*row, *self._readable(row)})

    def writes_date(self, row: Mapping[str, Any]) -> bool:
        """Return whether the chat template writes today's date into rows like this one."""
        formatted = self._readable(row)
        return has_messages(formatted) and writes_date(self.tokenizer, _variables_of(formatted))

    def writes_date_for_teacher(self, row: Mapping[str, Any]) -> bool:
        """Return whether it is written into the teacher's prompts of rows like this one, by its template or ours."""
        shown = {**_teachers_columns(row), **self._readable(row)}
        return self.teacher_prompts.renders(shown) and writes_date(self.teacher_prompts.tokenizer, _variables_of(shown))

    def _readable(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row as `formatting_func` makes it, or nothing if it can't be read, which `prepare` says."""
        try:
            return self._formatted(row)
        except (RowDropped, GKDDataError):
            return {}

    def _formatted(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        result = self.formatting_func(row) if self.formatting_func is not None else row
        if isinstance(result, str):
            return {self.rules.text_field: result}
        if isinstance(result, Mapping):
            return result
        if isinstance(result, list) and all(isinstance(message, Mapping) for message in result):
            return {"messages": result}
        if result is None:
            raise RowDropped("formatting_func returned None")
        raise GKDDataError(
            "formatting_func must turn one row into a text, a list of messages, or a row (a dict of "
            f"messages, prompt and completion, text, or input_ids); it returned {type(result).__name__}"
        )

    def _tokens(self, row: Mapping[str, Any], n_images: int) -> RowTokens:
        if row.get("input_ids") is not None:
            if self.rules.is_encoder_decoder:
                return held_pair(row)
            if self.rules.needs_prompt and trains_on_all(row):
                raise GKDDataError(NEEDS_PROMPT)
            return held_tokens(row)
        text_field = self.rules.text_field
        row_keys = (
            "messages",
            "conversations",
            "prompt",
            "completion",
            "tools",
            "chat_template_kwargs",
            text_field,
        )
        filled = {key: _without_none(row[key]) for key in row_keys if row.get(key) is not None}
        if "messages" in filled or "conversations" in filled:
            read = self._conversation
        elif "prompt" in filled:
            read = self._prompt_and_completion
        elif text_field in filled and self.rules.is_encoder_decoder:
            raise GKDDataError(
                f"an encoder-decoder needs a source and a target text; got rows of `{text_field}`: use `prompt` "
                "and `completion`, or messages"
            )
        elif text_field in filled:
            read = self._text
        elif has_format(row, text_field):
            raise RowDropped("nothing in any column that is read")
        else:
            raise GKDDataError(f"{no_format(row, text_field)}, or pass a formatting_func")
        if self.tokenizer is None:
            raise GKDDataError(
                "expected tokenised rows (`input_ids`), since there is no tokenizer; got the columns "
                f"{sorted(filled)}: pass the tokenizer as processing_class"
            )
        return read(filled, n_images, has_completion_column="completion" in row)

    def _conversation(self, row: dict[str, Any], n_images: int, *, has_completion_column: bool) -> RowTokens:
        if "messages" in row:
            row.pop("conversations", None)
        messages = self._messages(maybe_convert_to_chatml(row)["messages"], n_images)
        if not any(message["role"] == "assistant" for message in messages):
            if self.rules.needs_completion:
                raise RowDropped("no assistant turn")
            return self._chat_prompt(messages, row)
        return self._chat(messages, row, n_context=0)

    def _prompt_and_completion(self, row: dict[str, Any], n_images: int, *, has_completion_column: bool) -> RowTokens:
        prompt, completion = row["prompt"], row.get("completion")
        if completion is None and self.rules.needs_completion:
            if has_completion_column:
                raise RowDropped(NEEDS_COMPLETION)
            raise GKDDataError(NEEDS_COMPLETION)
        if isinstance(prompt, str):
            if completion is not None and not isinstance(completion, str):
                raise RowDropped("prompt is a text but completion is not")
            if self.rules.is_encoder_decoder:
                return text_pair(self.tokenizer, prompt, completion, self._stop_ids)
            if completion is None:
                ids = self._encoded(prompt)
                return RowTokens(ids, [IGNORE_INDEX] * len(ids))
            return self._completed_text(prompt, completion)
        row = maybe_convert_to_chatml(row)
        prompt = self._messages(row["prompt"], n_images)
        if completion is None:
            return self._chat_prompt(prompt, row)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        completion = self._messages(completion, 0)
        if not any(message["role"] == "assistant" for message in completion):
            raise RowDropped("no assistant turn")
        return self._chat(prompt + completion, row, n_context=len(prompt))

    def _messages(self, value: Any, n_images: int) -> list[dict[str, Any]]:
        if self.images is None:
            return texts_of(value, self.tokenizer)
        return with_image_parts(messages_of(value), n_images)

    def _chat(self, messages: list[dict[str, Any]], row: Mapping[str, Any], *, n_context: int) -> RowTokens:
        self._require_chat_template()
        tools, template_kwargs = tools_of(row), template_kwargs_of(row)
        is_pair = self.rules.is_encoder_decoder
        last_turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        is_open = self.rules.keeps_prompts and last_turn < len(messages) - 1
        n_given = len(messages) if is_open else last_turn
        prompt = ""
        try:
            messages = with_calls(self.tokenizer, messages, tools, template_kwargs)
            text, spans = render_turns(
                self.tokenizer,
                messages,
                n_context=n_context,
                is_last_only=is_pair or self.rules.train_on == "last_turn",
                patched_template=self.patched_template,
                tools=tools,
                template_kwargs=template_kwargs,
            )
            # No messages can't be rendered: the prompt of a turn that opens the conversation is the turn's header.
            if (self.rules.is_generating or is_pair) and n_given > 0:
                prompt = render_prompt(self.tokenizer, messages[:n_given], tools, template_kwargs)
        except GKDDataError:
            raise
        except TurnsNotFound:
            raise RowDropped(
                "assistant turns can't be found without {% generation %} markers in the chat template"
            ) from None
        except RENDERING_ERRORS as error:
            raise _refused(error) from error
        ids, ranges = encode_spans(self.tokenizer, text, spans)
        # A turn without a stop token ends with its template's end of turn, such as <|im_end|>; the newline behind that
        # begins the next turn.
        unended = without_stop(ids, ranges, self._stop_ids)
        ranges = [ended_at(self.tokenizer, ids, span, self.added_ids) if span in unended else span for span in ranges]
        labels = self._trained(turn_labels(ids, ranges, self._stop_ids))
        # A training template may render other text before a turn than the prompt that the model gets for it.
        prompt_ids, _ = encode_spans(self.tokenizer, prompt, [])
        prompt_ids = [] if prompt_ids == ids[: prompt_length(labels)] else prompt_ids
        # Completions are sampled for the last turn; templates end earlier turns differently (gpt-oss with <|end|>).
        is_unended = without_stop(ids, ranges[-1:], self._stop_ids)
        end = self._end_of(ids, ranges[-1]) if is_unended else ""
        tokens = RowTokens(ids, labels, prompt_ids, unended=end, is_open=is_open)
        return turn_pair(tokens) if is_pair else tokens

    def _chat_prompt(self, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> RowTokens:
        self._require_chat_template()
        template_kwargs, tools = template_kwargs_of(row), tools_of(row)

        def continued(given: list[Any]) -> str:
            prompt_row: dict[str, Any] = {"prompt": given, "chat_template_kwargs": template_kwargs}
            text: str = apply_chat_template(prompt_row, self.tokenizer, tools)["prompt"]
            return text

        try:
            messages = with_calls(self.tokenizer, messages, tools, template_kwargs)
            if messages[-1]["role"] == "assistant":
                text = with_arguments(continued, messages)
            else:
                text = render_prompt(self.tokenizer, messages, tools, template_kwargs)
        except RENDERING_ERRORS as error:
            raise _refused(error) from error
        ids, _ = encode_spans(self.tokenizer, text, [])
        return RowTokens(ids, [] if self.rules.is_encoder_decoder else [IGNORE_INDEX] * len(ids))

    def _completed_text(self, prompt: str, completion: str) -> RowTokens:
        text = prompt + completion
        ids, [(start, end)] = encode_spans(self.tokenizer, text, [(len(prompt), len(text))])
        n_leading = len(leading := self._leading(ids))
        ids = self._ended(leading + ids)
        ranges = [(start + n_leading, len(ids))] if start < end else []
        return RowTokens(ids, self._trained(turn_labels(ids, ranges, self._stop_ids)))

    def _text(self, row: dict[str, Any], n_images: int, *, has_completion_column: bool) -> RowTokens:
        if self.rules.needs_prompt:
            raise GKDDataError(NEEDS_PROMPT)
        text = row[self.rules.text_field]
        if not isinstance(text, str):
            raise RowDropped(f"{self.rules.text_field} is not a text")
        if not text:
            raise RowDropped("empty text")
        # Not cut at its first stop token: it may be several documents, or a rendered conversation.
        ids = self._ended(self._encoded(text))
        return RowTokens(ids, list(ids))

    def _encoded(self, text: str) -> list[int]:
        if not text:
            raise RowDropped("empty prompt")
        ids, _ = encode_spans(self.tokenizer, text, [])
        return self._leading(ids) + ids

    def _leading(self, ids: list[int]) -> list[int]:
        """Return the special tokens to put before a text; none if the text already begins with them."""
        n_leading = len(self.leading_ids)
        return [] if tuple(ids[:n_leading]) == self.leading_ids else list(self.leading_ids)

    def _ended(self, ids: list[int]) -> list[int]:
        eos_id = self.tokenizer.eos_token_id
        if eos_id is None or (ids and ids[-1] in self._stop_ids):
            return ids
        return [*ids, eos_id]

    def _end_of(self, ids: list[int], span: Span) -> str:
        last = ids[span[1] - 1]
        token = self.tokenizer.decode([last], skip_special_tokens=False)
        stops = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(self._stop_ids))
        where = f"generation ends at {stops or 'no token'}"
        if last not in self.added_ids:
            return f"{token!r}, which is not a special token, but {where}: make the chat template end turns with one"
        return (
            f"{token!r}, at which generation does not end ({where}): add its id, {last}, to eos_token_id in the "
            "student's generation_config"
        )

    def _trained(self, labels: list[int]) -> list[int]:
        if all(label == IGNORE_INDEX or label in self._stop_ids for label in labels):
            raise RowDropped("empty completion")
        return labels

    @property
    def _stop_ids(self) -> frozenset[int]:
        eos_id = self.tokenizer.eos_token_id
        return self.rules.stop_ids if eos_id is None else self.rules.stop_ids | {eos_id}

    def _require_chat_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise GKDDataError(
                "expected a tokenizer with a chat template, since the rows are messages; this one has none: "
                "set tokenizer.chat_template, or take the tokenizer of an instruction-tuned model"
            )


def _refused(error: Exception) -> RowDropped:
    return RowDropped(f"refused by the chat template ({str(error)[:100]})")


def _variables_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row's variables for the chat template, or none if they can't be read, which `prepare` says."""
    try:
        return template_kwargs_of(_without_none(row))
    except RowDropped:
        return {}


def _teachers_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a formatting_func need not repeat."""
    return {name: row[name] for name in (TEACHER_PROMPT, TEACHER_PROMPT_IDS) if name in row}


def _without_none(value: Any) -> Any:
    """Copy a value without the None that Arrow fills in for keys of other rows."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_without_none(item) for item in value]
    return value

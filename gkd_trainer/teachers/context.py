"""A prompt of the teacher's own: it reads more than the student, such as the solution or feedback on an answer.

Shapes: B batch, L length, P length of a teacher's prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.batch_keys import IGNORE_INDEX, PER_LABEL, ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.models.heads import find_context
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.prompts import prompt_ids, writes_date
from gkd_trainer.signals import Signal
from gkd_trainer.teachers.base import AligningTeacher, CompositeTeacher, StudentTeacher, Teacher, all_teachers
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or messages for the chat template of the teacher's tokenizer."""


class ContextTeacher(CompositeTeacher):
    """A teacher that reads a prompt made by a function of the row and the completion, instead of the sample's own.

    It scores the same tokens of the completion, by their ids, after another prompt. A row's own `teacher_prompt` takes
    precedence: the function is not called for it. The completion begins at the sample's first trained token, so
    GKDTrainer prepares conversations to be trained on only in their last turn.

    Args:
        teacher: The teacher that reads the prompts. Its vocabulary must be the student's.
        prompt: Called as `prompt(row, completion)` with a row of `rows` and the text of the completion to be scored,
            without special tokens. It returns a text, which is taken as it is; messages, which are rendered by the
            template of the teacher's tokenizer, or of the student's if that has none; or None, to read the sample's own
            prompt.
        rows: The rows, each with a `row_key` that no other has. The rows trained and evaluated on must have those keys.

    Raises:
        GKDTeacherError: `rows` have no keys, one key is in two rows, or the teacher reads other tokens.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompt: Callable[[Mapping[str, Any], str], Prompt | None],
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        if any(isinstance(each, AligningTeacher) for each in all_teachers(teacher)):
            raise GKDTeacherError(
                "a ContextTeacher scores a completion by the student's token ids, but this teacher reads other tokens: "
                "give its rows a column teacher_prompt instead"
            )
        self._teacher, self._prompt, self._rows = teacher, prompt, rows
        self._position_by_key = _positions_by_key(rows)
        self.tokenizer = teacher.tokenizer
        self.shares_weights = teacher.shares_weights  # type: ignore[misc]
        self._students_tokenizer: Any = None
        self._limit: int | None = None
        self._too_long = 0
        self._has_rendered = False

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The teacher that reads the prompts."""
        return (self._teacher,)

    def score(self, batch: TokenBatch) -> Signal:
        """Return the predictions at the batch's scored positions, in order, for the prompts of the teacher.

        A prompt that with its completion exceeds the teacher's context, or `max_length` if that is unknown, is not
        used: the sample's own is read instead, and the log counts such samples.

        Raises:
            GKDDataError: A sample has no key of one of the rows.
            GKDTeacherError: The function returned no prompt, or the template refused it.
        """
        if self._students_tokenizer is None:
            raise RuntimeError("ContextTeacher.score was called before prepare(device, tokenizer)")
        return self._teacher.score(with_teacher_prompts(self._prompted(batch)))

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the inner teacher predicts over."""
        return self._teacher.vocab_size

    @property
    def top_k(self) -> int | None:
        """How many tokens of each distribution the inner teacher gives."""
        return self._teacher.top_k

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The inner teacher's."""
        return self._teacher.vocabulary

    @property
    def model(self) -> PreTrainedModel | None:
        """The inner teacher's."""
        return self._teacher.model

    @property
    def is_local(self) -> bool:
        """Whether the inner teacher computes in this process."""
        return self._teacher.is_local

    @property
    def can_generate(self) -> bool:
        """Whether the inner teacher can: it completes the samples' own prompts, since its own show the completion."""
        return self._teacher.can_generate

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Prepare the inner teacher, and note the tokenizers.

        Raises:
            GKDTeacherError: There is no tokenizer to read completions with.
        """
        if tokenizer is None:
            raise GKDTeacherError(
                "a ContextTeacher reads completions as text, which needs the student's tokenizer: pass it as "
                "processing_class"
            )
        self._teacher.prepare(device, tokenizer, max_length)
        self._students_tokenizer, self._limit = tokenizer, longest_context(self._teacher, max_length)

    def _prompted(self, batch: TokenBatch) -> TokenBatch:
        """Return the batch with a teacher's prompt for each scored sample for which there is one."""
        host = batch.on_host
        given_BP, keys_B = host.side.get(TEACHER_PROMPT_IDS), host.side.get(ROW_KEY)
        lists = []
        for row, (start, end) in enumerate(_completions(host)):
            given = [] if given_BP is None else [i for i in given_BP[row].tolist() if i != IGNORE_INDEX]
            if not given and start < end:
                key = None if keys_B is None else int(keys_B[row])
                ids = _completion_ids(host, row, start, end)
                given = self._made_prompt(key, ids, is_source=batch.label_offset == 0)
                needed = len(given) + len(ids) * batch.label_offset  # an encoder reads no completion
                if given and self._limit is not None and needed > self._limit:
                    self._count_too_long(key, needed)
                    given = []
            lists.append(torch.tensor(given, dtype=torch.long))
        if not lists:  # one of several teachers, which has no sample in this batch
            return batch
        prompts_BP = pad_sequence(lists, batch_first=True, padding_value=IGNORE_INDEX)
        return batch.with_side(TEACHER_PROMPT_IDS, prompts_BP)

    def _made_prompt(self, key: int | None, completion_ids: list[int], *, is_source: bool) -> list[int]:
        position = None if key is None else self._position_by_key.get(key)
        if position is None:
            raise GKDDataError(
                f"a ContextTeacher finds a sample's row by its {ROW_KEY}; got {key}, which none of its "
                f"{len(self._position_by_key)} rows has: give the rows trained and evaluated on a column {ROW_KEY}, "
                "and pass all of them as rows"
            )
        text = self._students_tokenizer.decode(completion_ids, skip_special_tokens=True)
        prompt = self._prompt(self._rows[position], text)
        if prompt is None:
            return []
        is_messages = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
        if not (isinstance(prompt, str) or is_messages) or not prompt:
            raise GKDTeacherError(
                "the function of a ContextTeacher must return a text, a list of messages, or None for the sample's own "
                f"prompt; for the row with {ROW_KEY} {key} it returned {prompt!r:.100}"
            )
        try:
            tokenizer = template_tokenizer(self._teacher, self._students_tokenizer)
            ids = prompt_ids(tokenizer, prompt, is_source=is_source)
        except Exception as error:  # a template may raise anything
            raise GKDTeacherError(
                f"the teacher's prompt for the row with {ROW_KEY} {key} was refused by the chat template "
                f"({type(error).__name__}: {error}): return other messages, or a text"
            ) from error
        if not isinstance(prompt, str) and not self._has_rendered:
            self._has_rendered = True
            if writes_date(tokenizer, {}):
                logger.warning(
                    "The chat template writes today's date into the teacher's prompts, so a run resumed tomorrow has "
                    "others: write a date into its tokenizer's chat_template in place of strftime_now, or return texts."
                )
        return ids

    def _count_too_long(self, key: int | None, length: int) -> None:
        self._too_long += 1
        if self._too_long == 10 ** (len(str(self._too_long)) - 1):  # the first, tenth, hundredth
            logger.warning(
                "%d of the teacher's prompts were too long so far, and the samples' own were read instead: that of "
                "%s %s needs %d tokens, and the teacher takes %d.",
                self._too_long,
                ROW_KEY,
                key,
                length,
                self._limit,
            )


def with_teacher_prompts(batch: TokenBatch) -> TokenBatch:
    """Return the batch as its teacher reads it: TEACHER_PROMPT_IDS stand before the completions of the samples.

    A completion begins at the sample's first trained token. The scored tokens are the same, in the same order. Samples
    without such a prompt stay as they are. The prompts stay in `side`, and putting them in again changes nothing. In an
    encoder-decoder they take the place of what the encoder reads.

    Raises:
        GKDDataError: The batch holds more than token ids, which can't be moved to another prompt.
    """
    if batch.side.get(TEACHER_PROMPT_IDS) is None:
        return batch
    host = batch.on_host
    sizes = (host.side[TEACHER_PROMPT_IDS] != IGNORE_INDEX).sum(dim=1).tolist()
    if not any(sizes):
        return batch
    _require_only_tokens(batch)
    return _with_prompts(host, sizes).to(batch.labels_BL.device)


def _with_prompts(batch: TokenBatch, sizes: list[int]) -> TokenBatch:
    """Return a batch on the CPU with the teacher's prompts, of so many tokens, before the completions."""
    prompts_BP = batch.side[TEACHER_PROMPT_IDS]
    ids_BL, labels_BL = batch.model_inputs["input_ids"], _scored_labels(batch)
    mask_BL = batch.model_inputs.get("attention_mask")
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    rows: dict[str, list[Tensor]] = {"ids": [], "labels": [], "mask": []}
    is_encoder = batch.label_offset == 0
    for row, (start, end) in enumerate(_completions(batch)):
        own = slice(None) if not sizes[row] else slice(0) if is_encoder else slice(start, end)
        prompt_P = prompts_BP[row, : sizes[row]]
        rows["ids"].append(torch.cat([prompt_P.to(ids_BL), ids_BL[row, own]]))
        rows["mask"].append(torch.cat([torch.ones_like(prompt_P).to(mask_BL), mask_BL[row, own]]))
        rows["labels"].append(torch.cat([torch.full_like(prompt_P, IGNORE_INDEX).to(labels_BL), labels_BL[row, own]]))
    # What pads is hidden by the mask.
    model_inputs = {
        **batch.model_inputs,
        "input_ids": pad_sequence(rows["ids"], batch_first=True),
        "attention_mask": pad_sequence(rows["mask"], batch_first=True),
    }
    if is_encoder:
        return replace(batch, model_inputs=model_inputs)
    labels_BL = pad_sequence(rows["labels"], batch_first=True, padding_value=IGNORE_INDEX)
    return replace(batch, model_inputs=model_inputs, labels_BL=labels_BL)


def longest_context(teacher: Teacher, max_length: int | None) -> int | None:
    """Return how many tokens a prepared teacher takes: the least that its models and servers do, else `max_length`."""
    each_in = list(all_teachers(teacher))
    models = [each.student if isinstance(each, StudentTeacher) else each.model for each in each_in]
    contexts = [find_context(base_model(model)) for model in models if model is not None]
    limits = [context.limit for context in contexts if context is not None]
    limits += [each.longest_sequence for each in each_in if each.longest_sequence is not None]
    return min(limits, default=max_length)


def template_tokenizer(teacher: Teacher, tokenizer: Any) -> Any:
    """Return the tokenizer whose template renders a teacher's prompts: its own if it has one, else the student's."""
    own = teacher.tokenizer
    return own if own is not None and getattr(own, "chat_template", None) is not None else tokenizer


def _completions(batch: TokenBatch) -> list[tuple[int, int]]:
    """Return the columns of each sample's completion, from its first trained token to its last; (0, 0) without one."""
    is_trained_BL = batch.labels_BL != IGNORE_INDEX
    length = is_trained_BL.shape[1]
    start_B = is_trained_BL.int().argmax(dim=1)
    end_B = length - is_trained_BL.flip(1).int().argmax(dim=1)
    bounds_B2 = torch.stack([start_B, end_B], dim=1) * is_trained_BL.any(dim=1, keepdim=True)
    return [(start, end) for start, end in bounds_B2.tolist()]


def _scored_labels(batch: TokenBatch) -> Tensor:
    """Return the labels without those of the first column, which no position predicts in the student."""
    labels_BL = batch.labels_BL.clone()
    labels_BL[:, : batch.label_offset] = IGNORE_INDEX
    return labels_BL


def _completion_ids(batch: TokenBatch, row: int, start: int, end: int) -> list[int]:
    """Return the tokens of a sample's completion, with those that a tool wrote; a decoder's labels lack those."""
    values_BL = batch.model_inputs["input_ids"] if batch.label_offset else batch.labels_BL
    return [token_id for token_id in values_BL[row, start:end].tolist() if token_id != IGNORE_INDEX]


def _require_only_tokens(batch: TokenBatch) -> None:
    own = {"input_ids", "attention_mask"} | (set() if batch.label_offset else PER_LABEL)
    others = sorted(batch.model_inputs.keys() - own)
    if others:
        raise GKDDataError(
            f"a teacher's own prompt takes the place of the sample's tokens, but this batch also holds "
            f"{', '.join(others)}, which belong to those: make the data collator leave them out, or give no "
            "teacher_prompt"
        )


def _positions_by_key(rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    columns = getattr(rows, "column_names", None)
    is_keyed = ROW_KEY in columns if columns is not None else all(ROW_KEY in row for row in rows)
    if not is_keyed or len(rows) == 0:
        raise GKDTeacherError(
            f"a ContextTeacher finds rows by their {ROW_KEY}, but its rows have none: number them, for example with "
            f"rows.add_column({ROW_KEY!r}, list(range(len(rows))))"
        )
    keys = rows[ROW_KEY] if columns is not None else [row[ROW_KEY] for row in rows]  # type: ignore[call-overload]
    positions = {int(key): position for position, key in enumerate(keys)}
    if len(positions) < len(rows):
        raise GKDTeacherError(
            f"a ContextTeacher finds rows by their {ROW_KEY}, but its {len(rows)} rows have only {len(positions)} "
            "different ones: number them"
        )
    return positions

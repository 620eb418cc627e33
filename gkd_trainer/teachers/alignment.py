"""The same bytes as two tokenizers' tokens, and the positions at which both begin a token.

Shapes: L tokens of the student's row, P tokens of the teacher's, A positions at which both begin a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from gkd_trainer.models.prompts import RENDERING_ERRORS
from gkd_trainer.models.token_bytes import TokenBytes, token_bytes

_INVALID = re.compile(r"([\udc80-\udcff]+)")
"""Bytes that are not UTF-8, as `bytes.decode(errors="surrogateescape")` writes them."""

_REPLY = "Paris"
"""A reply that is found again in what a chat template writes."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AlignedRow:
    """The teacher's tokens for a student's row, and which tokens of both begin at the same byte.

    The token at `student_A[a]` of the student's row and the one at `teacher_A[a]` of `teacher_ids` follow the same
    text; both are in ascending order.
    """

    teacher_ids: list[int]
    student_A: Ints
    teacher_A: Ints


class Aligner:
    """Writes a student's rows in the teacher's tokens.

    A special token becomes the teacher's of the same name, the end of a turn becomes its end of a turn, and any other
    becomes the tokens of its name. The bytes between them, decoded and encoded, are the same in both rows; a character
    that the teacher's tokenizer changes or does not know has no shared boundary inside. The space before a text that
    some tokenizers add, and the one before a reply that some chat templates or tokenizers add, is the teacher's own.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.

    Raises:
        GKDTeacherError: The bytes of the tokens of either can't be known.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self.student, self.teacher = token_bytes(student), token_bytes(teacher)
        self.special_ids = _special_ids(self.student, self.teacher, _roles(student, teacher))
        self._student_leading = _leading_ids(student, self.student)
        self._teacher_leading = _leading_ids(teacher, self.teacher)
        self._student_replies = _replies_of(student, self.student)
        self._teacher_replies = _replies_of(teacher, self.teacher)
        self._student_turn_end = turn_end_id(student)
        self._names: dict[int, list[int]] = {}

    def aligned(
        self,
        ids: Sequence[int],
        breaks: Iterable[int] = (),
        *,
        start: int = 0,
        prompt_ids: Sequence[int] | None = None,
        limit: int | None = None,
    ) -> AlignedRow:
        """Return a row in the teacher's tokens.

        Args:
            ids: The student's tokens, L of them.
            breaks: Columns at which the teacher begins a token too, such as the first of a completion.
            start: Where the teacher's own prompt ends in `ids`; the tokens before it are not written.
            prompt_ids: What the teacher reads in their place. None writes all of `ids`, after the special tokens that
                the teacher's tokenizer puts before a text, such as bos.
            limit: The maximum number of the teacher's tokens; the others are cut.
        """
        if prompt_ids is None:
            n_leading = len(self._student_leading)
            start = n_leading if tuple(ids[:n_leading]) == self._student_leading else 0
        ids_L = np.asarray(ids, dtype=np.int64)
        is_special_L = ids_L >= self.student.size  # ids that pad the head stand for nothing
        is_special_L |= self.student.is_special_V[np.where(is_special_L, 0, ids_L)]
        # A special token counts as one byte of both.
        length_L = np.where(is_special_L, 1, self.student.length_V[np.where(is_special_L, 0, ids_L)])
        length_L[:start] = 0
        special = np.flatnonzero(is_special_L)
        edges = np.unique([start, len(ids), *breaks, *special, *(special + 1)])
        edges = edges[edges >= start].tolist()
        lead, teacher_lead, tail = self._margins(ids[:start], prompt_ids)
        if lead == teacher_lead or not edges[:-1] or is_special_L[start]:
            lead = teacher_lead = b""
        elif not self.student.of(ids[start : edges[1]]).startswith(lead):
            lead = b""
        # Bytes count from where the text begins in both: a token that begins before has no counterpart.
        begin_L = np.cumsum(length_L) - length_L - len(lead)
        row = _Writing(list(self._teacher_leading if prompt_ids is None else prompt_ids))
        n_dropped = 0
        for first, last in pairwise(edges):
            position = int(begin_L[first])
            if is_special_L[first]:
                # After a tail that the teacher does not read, both end the turn at the tail's place.
                self._write_special(row, ids[first], position - n_dropped)
                n_dropped = 0
            else:
                data = self.student.of(ids[first:last])[len(lead) :]
                if tail and data.endswith(tail) and last < len(ids) and ids[last] == self._student_turn_end:
                    n_dropped = len(tail)
                    data = data[:-n_dropped]
                self._write_text(row, data, position + len(lead), teacher_lead)
            lead = teacher_lead = b""
        teacher_begin_P = row.begins(self.teacher.length_V)
        if limit is not None:
            teacher_begin_P = teacher_begin_P[:limit]
        column_of = np.full(int(length_L.sum()) + 1, -1, np.int64)
        columns = np.flatnonzero(teacher_begin_P >= 0)
        column_of[teacher_begin_P[columns]] = columns
        student = np.flatnonzero((length_L > 0) & (begin_L >= 0))
        teacher = column_of[begin_L[student]]
        return AlignedRow(row.ids[:limit], student[teacher >= 0], teacher[teacher >= 0])

    def _write_special(self, row: _Writing, token_id: int, position: int) -> None:
        counterpart = self.special_ids.get(token_id)
        if counterpart is not None:
            row.write([counterpart], position, [position])
            return
        if token_id not in self._names:
            self._names[token_id] = self.teacher.encoded(self.student.of([token_id]).decode())
        written = self._names[token_id]
        row.write(written, position, [position, *[-1] * len(written)][: len(written)])

    def _margins(self, student_prompt: Sequence[int], prompt_ids: Sequence[int] | None) -> tuple[bytes, bytes, bytes]:
        """Return the whitespace that the student's tokens, and the teacher's, have before the text that is written.

        The third is what the student's have before the end of the turn, if the teacher reads none there. One whose
        template writes some reads none either if the student's does not: Llama 2 itself ends without it.
        """
        if prompt_ids is None:
            return b" " * self.student.prepends_space, b" " * self.teacher.prepends_space, b""
        theirs = _reply_after(prompt_ids, self.teacher, self._teacher_replies)
        if theirs is None:
            return b"", b"", b""  # a prompt of the user's, after which nothing is known
        mine = _reply_after(student_prompt, self.student, self._student_replies)
        if mine is None:
            return b"", theirs.lead, b""
        return mine.lead, theirs.lead, b"" if mine.tail == theirs.tail else mine.tail

    def _write_text(self, row: _Writing, data: bytes, position: int, lead: bytes) -> None:
        """Write text after whitespace that only the teacher reads; the text begins at `position`."""
        data, position = lead + data, position - len(lead)
        for piece in _INVALID.split(data.decode(errors="surrogateescape")):
            raw = piece.encode(errors="surrogateescape")
            if _INVALID.match(piece):
                # A byte fallback's own tokens are the last of their bytes; a byte without any is left out.
                for place in range(len(raw)):
                    for token_id in self.teacher.by_bytes.get(raw[place : place + 1], ())[-1:]:
                        row.write([token_id], position + place)
            elif piece:
                written = self.teacher.encoded(piece)
                is_changed = self.teacher.of(written) != raw
                row.write(written, position, self._known_begins(piece, position) if is_changed else None)
            position += len(raw)

    def _known_begins(self, text: str, position: int) -> list[int]:
        """Return where tokens begin in a text that the teacher's tokenizer changes; -1 inside a character."""
        starts = np.cumsum([position, *(len(character.encode()) for character in text)]).tolist()
        begins, end = [], 0
        for first, last in self.teacher.offsets(text):
            begins.append(starts[first] if end <= first < last else -1)
            end = max(end, last)
        return begins


class _Writing:
    """A row that is being written in the teacher's tokens."""

    def __init__(self, ids: list[int]) -> None:
        """Begin with tokens that only the teacher reads."""
        self.ids = ids
        self._n_leading = len(ids)
        self._columns: list[int] = []
        self._positions: list[int] = []
        self._known: list[tuple[int, list[int]]] = []

    def write(self, ids: Sequence[int], position: int, begins: list[int] | None = None) -> None:
        """Add tokens that begin at a byte; `begins` is where each of them does, -1 if unknown, or None by its bytes."""
        self._columns.append(len(self.ids))
        self._positions.append(position)
        if begins is not None:
            self._known.append((len(self.ids), begins))
        self.ids += ids

    def begins(self, length_V: Ints) -> Ints:
        """Return the byte at which each token begins; negative if unknown, before the text, or if it is empty."""
        begin_P = np.full(len(self.ids), -1, np.int64)
        if not self._columns:
            return begin_P
        length_P = length_V[np.asarray(self.ids[self._n_leading :], dtype=np.int64)]
        end_P = np.cumsum(length_P)
        first = np.asarray(self._columns) - self._n_leading
        sizes = np.diff([*first, len(length_P)])
        offset = np.asarray(self._positions) - np.append(0, end_P)[first]
        end_P = end_P + np.repeat(offset, sizes)
        own_P = end_P - length_P
        begin_P[self._n_leading :] = np.where(own_P < end_P, own_P, -1)
        for column, begins in self._known:
            begin_P[column : column + len(begins)] = begins
        return begin_P


def matched_ids(aligner: Aligner) -> list[tuple[int, int]]:
    """Return the pairs of ids, student's and teacher's, that stand for the same bytes or the same special token.

    Each id is in at most one pair. If several tokens of a tokenizer have the same bytes, such as A and <0x41>, they are
    paired in the order of `TokenBytes.by_bytes`.
    """
    pairs = list(aligner.special_ids.items())
    for shared, student_ids in aligner.student.by_bytes.items():
        pairs += zip(student_ids, aligner.teacher.by_bytes.get(shared, ()), strict=False)
    return sorted(pairs)


def _special_ids(student: TokenBytes, teacher: TokenBytes, roles: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the teacher's special token for each of the student's that has one, by role and then by name."""
    by_name = {teacher.bytes_V[each]: each for each in np.flatnonzero(teacher.is_special_V).tolist()}
    named = ((each, by_name.get(student.bytes_V[each])) for each in np.flatnonzero(student.is_special_V).tolist())
    found, taken = dict[int, int](), set[int]()
    for token_id, counterpart in (*roles, *named):
        if counterpart is not None and token_id not in found and counterpart not in taken:
            found[token_id] = counterpart
            taken.add(counterpart)
    return found


def _roles(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return the special tokens that both have for the same purpose: the end of a turn, and of a text."""
    pairs = [(turn_end_id(student), turn_end_id(teacher)), (student.eos_token_id, teacher.eos_token_id)]
    return [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which a chat template ends the assistant's turn; without one, eos or None."""
    eos_id: int | None = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        return eos_id
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _REPLY}], tokenize=False
        )
        ids = tokenizer(str(text).rpartition(_REPLY)[2], add_special_tokens=False)["input_ids"]
    except RENDERING_ERRORS:
        return eos_id
    special = {token_id for token_id, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token_id for token_id in ids if token_id in special), eos_id)


@dataclass(frozen=True)
class _Reply:
    """What a chat template writes before each reply, as bytes, and the whitespace on both sides of the reply."""

    header: bytes
    lead: bytes
    tail: bytes


def _reply_after(prompt_ids: Sequence[int], tokens: TokenBytes, replies: Iterable[_Reply]) -> _Reply | None:
    """Return the first of the replies whose header a prompt ends with."""
    return next((each for each in replies if tokens.of(prompt_ids[-len(each.header) :]).endswith(each.header)), None)


def _replies_of(tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes) -> list[_Reply]:
    """Find out what surrounds replies to users and to tools, in the tokenizer's own tokens.

    A tokenizer may add a space that the template does not write: Phi-3's puts one after a special token. Llama 2's
    template writes a space on both sides.
    """

    def written(messages: list[dict[str, Any]], *, is_prompt: bool) -> bytes:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        return tokens.of(tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def found(asked: Callable[[str], list[dict[str, Any]]]) -> _Reply:
        prompt, other = (written(asked(text), is_prompt=True) for text in ("Hello", "Thanks"))
        whole = written([*asked("Hello"), {"role": "assistant", "content": _REPLY}], is_prompt=False)
        both = zip(prompt[::-1], other[::-1], strict=False)
        n_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        lead, reply, rest = whole.removeprefix(prompt).partition(_REPLY.encode())
        is_lead = whole.startswith(prompt) and reply and not lead.strip()
        return _Reply(
            prompt[len(prompt) - n_shared :], lead if is_lead else b"", rest[: len(rest) - len(rest.lstrip())]
        )

    replies = []
    for asked in (_by_user, _by_tool) if tokenizer.chat_template is not None else ():
        with suppress(*RENDERING_ERRORS):  # few templates know of tools
            replies.append(found(asked))
    return [each for each in replies if each.header]


def _by_user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _by_tool(text: str) -> list[dict[str, Any]]:
    call_id = (text * 9)[:9]  # Mistral's templates take no other length
    call = {"id": call_id, "type": "function", "function": {"name": "look", "arguments": {}}}
    return [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look", "tool_call_id": call_id, "content": text},
    ]


def _leading_ids(tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text, such as bos."""
    ids = tokenizer("a")["input_ids"]
    n_leading = next((place for place, each in enumerate(ids) if not tokens.is_special_V[each]), 0)
    return tuple(ids[:n_leading])

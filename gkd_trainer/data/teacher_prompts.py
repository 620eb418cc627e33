"""The prompt that the teacher reads instead of a row's own, from the row's column `teacher_prompt`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import maybe_convert_to_chatml

from gkd_trainer.batch_keys import IGNORE_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.data.messages import has_messages, template_kwargs_of, texts_of, tools_of
from gkd_trainer.data.rendered_prompts import RenderedPrompts
from gkd_trainer.data.tokens import RowDropped, id_list, refuse_negative_ids
from gkd_trainer.errors import GKDDataError
from gkd_trainer.models.prompts import prompt_ids
from gkd_trainer.types import prompt_length

TEACHER_PROMPT = "teacher_prompt"
"""The column of a row that holds the prompt that the teacher reads: a text, or messages."""


@dataclass(frozen=True)
class TeacherPrompts:
    """How rows' prompts for the teacher become token ids.

    `tokenizer` is the teacher's, or the student's if the teacher's has no chat template; None suffices for rows that
    hold token ids. The teacher takes `limit` tokens, prompt and completion together, or the prompt if
    `is_encoder_decoder`, whose encoder reads it; None is unlimited. For a teacher with another tokenizer, `rendered`
    gives the prompt of a row that has none of its own. `may_follow` says that a teacher makes prompts from the
    completions later (a ContextTeacher), so that any row may get one.
    """

    tokenizer: Any = None
    limit: int | None = None
    is_encoder_decoder: bool = False
    rendered: RenderedPrompts | None = None
    may_follow: bool = False

    def ids_of(self, row: Mapping[str, Any], *, is_generating: bool = False) -> list[int]:
        """Return the teacher's prompt of a row, which may get a completion if `is_generating`; empty if it has none.

        Raises:
            RowDropped: The prompt can't be read.
            GKDDataError: There is no tokenizer, or no chat template, to render it with.
        """
        if row.get(TEACHER_PROMPT) is None:  # the rows of a dataset that is already prepared keep theirs
            held = row.get(TEACHER_PROMPT_IDS)
            if held is not None:
                ids = id_list(held, TEACHER_PROMPT_IDS)
                refuse_negative_ids(ids, TEACHER_PROMPT_IDS)
                return ids
            return [] if self.rendered is None else self.rendered.of(row, is_generating=is_generating)
        if self.tokenizer is None:
            raise GKDDataError(
                f"expected the token ids of the teacher's prompts ({TEACHER_PROMPT_IDS}), since there is no tokenizer; "
                f"got a column {TEACHER_PROMPT}: pass the tokenizer as processing_class"
            )
        prompt = row[TEACHER_PROMPT]
        if not isinstance(prompt, str):
            prompt = texts_of(maybe_convert_to_chatml({"prompt": prompt})["prompt"], self.tokenizer)
            if self.tokenizer.chat_template is None:
                raise GKDDataError(
                    f"expected a tokenizer with a chat template, since {TEACHER_PROMPT} holds messages; neither the "
                    "teacher's nor the student's has one: render them to text, or set tokenizer.chat_template"
                )
        try:
            ids = prompt_ids(
                self.tokenizer,
                prompt,
                tools=tools_of(row),
                template_kwargs=template_kwargs_of(row),
                is_source=self.is_encoder_decoder,
            )
        except RowDropped:
            raise
        except Exception as error:  # a template may raise anything
            raise RowDropped(f"{TEACHER_PROMPT} refused by the chat template ({str(error)[:100]})") from error
        if not ids:
            raise RowDropped(f"empty {TEACHER_PROMPT}")
        return ids

    def renders(self, row: Mapping[str, Any]) -> bool:
        """Return whether messages are rendered as the teacher's prompt of a row."""
        given = row.get(TEACHER_PROMPT)
        if given is not None:
            return not isinstance(given, str)
        return self.rendered is not None and row.get(TEACHER_PROMPT_IDS) is None and has_messages(row)

    def trained(self, labels: list[int], prompt: list[int]) -> list[int]:
        """Return a row's labels, limited to the last run if the teacher reads a prompt of its own, or may do so."""
        return only_last_run(labels) if prompt or self.may_follow else labels

    def require_room(self, prompt: Sequence[int], n_completion: int) -> None:
        """Raise RowDropped if the teacher can't take a prompt with a completion of `n_completion` tokens."""
        needed = len(prompt) + (0 if self.is_encoder_decoder else n_completion)
        if self.limit is not None and needed > self.limit:
            completed = "" if self.is_encoder_decoder else " with its completion"
            raise RowDropped(f"{TEACHER_PROMPT}{completed} longer than the teacher's {self.limit} tokens")


def has_teacher_prompts(columns: Collection[str]) -> bool:
    """Return whether any of a dataset's columns holds prompts for the teacher."""
    return not {TEACHER_PROMPT, TEACHER_PROMPT_IDS}.isdisjoint(columns)


def only_last_run(labels: Sequence[int]) -> list[int]:
    """Return labels that train only the last run: the teacher's prompt takes the place of all before it."""
    start = prompt_length(labels)
    return [IGNORE_INDEX] * start + list(labels[start:])

"""Which rows can be used and which of their tokens are trained on; rows cut to fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data.images import ImageProcessing
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.data.tokens import RowDropped, RowTokens
from gkd_trainer.types import prompt_length


@dataclass(frozen=True)
class RowRules:
    """Which rows can be used, and which of their tokens are trained on.

    `stop_ids` are the ids at which generation ends (the model's and the tokenizer's). `max_length` bounds
    prompt plus completion in tokens; None is unbounded. `train_on` is "all_turns" or "last_turn".
    `is_generating` says that some completions will be generated, so that a prompt must leave room for
    `max_new_tokens`; `needs_completion` that some will be taken from the data; `needs_prompt` that the
    student will generate all of them. `text_field` is the column of plain text. Rows with token ids of
    `vocab_size` or above can't be used; None allows any id. For an encoder-decoder, `max_length` bounds what the
    encoder reads and the labels, each.
    """

    stop_ids: frozenset[int]
    max_length: int | None
    max_new_tokens: int
    train_on: str
    is_generating: bool
    needs_completion: bool
    needs_prompt: bool
    text_field: str = "text"
    vocab_size: int | None = None
    is_encoder_decoder: bool = False

    @property
    def keeps_prompts(self) -> bool:
        """Whether rows get the column PROMPT_IDS; all that an encoder reads is the prompt."""
        return self.is_generating and not self.is_encoder_decoder


@dataclass(frozen=True)
class PreparedRow:
    """Token ids and labels of a row, cut to `max_length`.

    `n_prompt` counts the tokens of its on-policy prompt: `prompt_ids`, or if empty, the tokens before the last trained
    run of the uncut row. `per_token` holds the row's own per-token columns, cut likewise. `unended` names the token
    that ends its last turn instead of a stop token, or is empty. `teacher_prompt_ids` is the teacher's own prompt,
    or empty. `is_cut` says that the row was longer, and that this matters: its completion is not always generated.
    """

    input_ids: list[int]
    labels: list[int]
    n_prompt: int
    prompt_ids: list[int]
    per_token: dict[str, list[Any]]
    unended: str
    teacher_prompt_ids: list[int] = field(default_factory=list)
    is_cut: bool = False


def fitted(
    tokens: RowTokens,
    teacher_ids: list[int],
    rules: RowRules,
    teacher_prompts: TeacherPrompts,
    images: ImageProcessing | None,
) -> PreparedRow:
    """Return a row of a causal LM, with the teacher's own prompt if it has one, cut to `max_length`.

    Raises RowDropped if the rules leave nothing to train on or to complete.
    """
    if tokens.is_open and (teacher_ids or teacher_prompts.may_follow):
        # The teacher's prompt is that of the new completion, not of a turn in the middle.
        if rules.needs_completion:
            raise RowDropped("no assistant turn after the teacher's own prompt")
        tokens = RowTokens(tokens.prompt_ids, [IGNORE_INDEX] * len(tokens.prompt_ids))
    ids, prompt_ids = tokens.ids, tokens.prompt_ids
    labels = teacher_prompts.trained(tokens.labels, teacher_ids)
    if not ids:
        raise RowDropped("no tokens")
    shared_ids = teacher_ids if teacher_prompts.rendered is None else []
    if rules.vocab_size is not None and max(*ids, *labels, *prompt_ids, *shared_ids) >= rules.vocab_size:
        raise RowDropped(f"a token id beyond the models' {rules.vocab_size} tokens")
    n_prompt = len(prompt_ids) or prompt_length(labels)
    first_trained = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), None)
    if first_trained is None and rules.needs_completion:
        raise RowDropped("no token is trained on")
    if n_prompt == 0 and rules.needs_prompt:
        raise RowDropped("no prompt, although lmbda=1.0 generates every completion")
    if rules.max_length is not None:
        is_completed = rules.is_generating or first_trained is None
        if is_completed and n_prompt > rules.max_length - rules.max_new_tokens:
            bound = f"({rules.max_length} - {rules.max_new_tokens})"
            reason = f"prompt longer than max_length - max_new_tokens {bound}"
            raise RowDropped(reason, n_prompt + rules.max_new_tokens)
        if first_trained is not None and first_trained >= rules.max_length:
            reason = f"no trained token within max_length ({rules.max_length})"
            raise RowDropped(reason, first_trained + 1)
    if images is not None:
        images.require_whole(ids, rules.max_length)
    cut = slice(rules.max_length)
    if teacher_ids:
        is_completed = rules.is_generating or first_trained is None
        n_completion = len(ids[cut]) - prompt_length(labels)
        teacher_prompts.require_room(teacher_ids, max(n_completion, rules.max_new_tokens * is_completed))
    per_token = {column: values[cut] for column, values in tokens.per_token.items()}
    is_cut = len(ids[cut]) < len(ids) and not rules.needs_prompt
    return PreparedRow(ids[cut], labels[cut], n_prompt, prompt_ids, per_token, tokens.unended, teacher_ids, is_cut)


def fitted_pair(
    tokens: RowTokens, teacher_ids: list[int], rules: RowRules, teacher_prompts: TeacherPrompts
) -> PreparedRow:
    """Return a row of an encoder-decoder likewise: its labels are cut, what the encoder reads is not."""
    ids, labels = tokens.ids, tokens.labels
    if not ids:
        raise RowDropped("no tokens")
    if rules.vocab_size is not None and max([*ids, *labels, *teacher_ids]) >= rules.vocab_size:
        raise RowDropped(f"a token id beyond the models' {rules.vocab_size} tokens")
    if rules.max_length is not None and len(ids) > rules.max_length:
        raise RowDropped(f"prompt longer than max_length ({rules.max_length})", len(ids))
    cut = labels[: rules.max_length]
    if rules.needs_completion and all(label == IGNORE_INDEX for label in cut):
        raise RowDropped("no token is trained on")
    if teacher_ids:
        teacher_prompts.require_room(teacher_ids, len(cut))
    is_cut = len(cut) < len(labels) and not rules.needs_prompt
    return PreparedRow(ids, cut, len(ids), [], tokens.per_token, tokens.unended, teacher_ids, is_cut)

"""Which rows fit the contexts of all students that are compared, known before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd_trainer.data.rules import PreparedRow
from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.models.heads import context_of
from gkd_trainer.models.loading import find_tokenizer, loading_failure, stored_config
from gkd_trainer.report.heat_maps import Reading, prepared_row, prompt_of
from gkd_trainer.rollouts.build import stop_ids_of


@dataclass(frozen=True)
class Reader:
    """How a student reads rows, by its files without its weights; `limit` is its context, None if unknown.

    `vocab_size` None allows any id: which are compared depends on the teacher too.
    """

    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: list[int]
    is_encoder_decoder: bool
    limit: int | None
    vocab_size: int | None = None


@dataclass(frozen=True)
class FittingRows:
    """The rows that fit, by index; `note` says how many do not, and is empty if all do."""

    kept: tuple[int, ...]
    note: str


def reader_of(name_or_path: str, trust_remote_code: bool) -> Reader:
    """Return how a student reads rows, by its name or folder; raise GKDConfigError if it can't be read."""
    try:
        config = stored_config(name_or_path, {"trust_remote_code": trust_remote_code})
    except Exception as error:  # from_pretrained and the libraries below it may raise anything
        raise GKDConfigError(loading_failure("student", name_or_path, "model_init_kwargs", error)) from error
    try:
        generation = GenerationConfig.from_pretrained(config.name_or_path)  # an adapter's base model
    except OSError:
        generation = GenerationConfig.from_model_config(config)  # as transformers does
    tokenizer = find_tokenizer(name_or_path, trust_remote_code)
    context = context_of(config)
    limit = None if context is None else context.limit
    return Reader(tokenizer, stop_ids_of(generation, tokenizer), bool(config.is_encoder_decoder), limit)


def fitting_rows(
    rows: Sequence[Mapping[str, Any]], readers: Sequence[Reader], teacher_limit: int | None, max_new_tokens: int
) -> FittingRows:
    """Return the rows of which all students can read the whole, and complete the prompt.

    Args:
        rows: From `measuring.usable_rows`.
        readers: The students.
        teacher_limit: The teacher's context in tokens; None if unknown.
        max_new_tokens: The longest completion.

    Raises GKDDataError if a row can't be used, or none fits.
    """
    limits = [limit for limit in (teacher_limit, *(reader.limit for reader in readers)) if limit is not None]
    if not limits:
        return FittingRows(tuple(range(len(rows))), "")
    limit = min(limits)
    needed = [max(_needed(reader, row, index, max_new_tokens) for reader in readers) for index, row in enumerate(rows)]
    kept = tuple(index for index, length in enumerate(needed) if length <= limit)
    if not kept:
        raise GKDDataError(
            f"expected rows that fit the shortest context of the models, {limit} tokens, with completions of "
            f"max_new_tokens={max_new_tokens}; the shortest of {len(rows)} needs {min(needed)}: lower max_new_tokens, "
            "or choose shorter rows"
        )
    n_dropped = len(rows) - len(kept)
    subject = "1 row that exceeds" if n_dropped == 1 else f"{n_dropped} rows that exceed"
    note = (
        f"Left out: {subject} the shortest context ({limit} tokens), either as they are or as a prompt with "
        f"{max_new_tokens} new tokens."
    )
    return FittingRows(kept, note if n_dropped else "")


def prepared_prompt(models: Reading, row: Mapping[str, Any], index: int, max_new_tokens: int) -> PreparedRow:
    """Return a row as tokens; raise GKDDataError with its index if it can't be used or has no prompt."""
    try:
        prepared = prepared_row(models, row, max_new_tokens, is_generating=True)
    except GKDDataError as error:
        raise GKDDataError(f"row {index}: {error}") from error
    if not prompt_of(prepared):
        raise GKDDataError(f"row {index}: expected a prompt for the student to complete; it has none")
    return prepared


def _needed(reader: Reader, row: Mapping[str, Any], index: int, max_new_tokens: int) -> int:
    """Return the context that a row needs, in tokens; an encoder-decoder's prompt and completion need one each."""
    prepared = prepared_prompt(reader, row, index, max_new_tokens)
    n_prompt = 0 if reader.is_encoder_decoder else len(prompt_of(prepared))
    return max(len(prepared.input_ids), len(prepared.labels), n_prompt + max_new_tokens)

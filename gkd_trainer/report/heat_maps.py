"""A heat-map of a completion for a notebook: how far student and teacher are apart at each of its tokens."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data import RowRules
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.rules import PreparedRow
from gkd_trainer.data.tokens import RowDropped
from gkd_trainer.divergence import token_divergence
from gkd_trainer.divergence.options import unit_of
from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.page import map_values, rendered
from gkd_trainer.report.pair import Pair, pair
from gkd_trainer.report.token_map import TOP, TokenMap, token_maps
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.teachers import Teacher
from gkd_trainer.teachers.other_tokenizer import vocabulary_modes

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text, messages, or token ids."""


@dataclass(frozen=True)
class HeatMap:
    """A completion as a coloured text whose tokens show, on hover, what both models would have written there.

    `tokens` has the numbers; a notebook shows the object, and `save` writes it as a page. `unit` is that of the
    divergence: "nats", or an empty string if it has none.
    """

    tokens: TokenMap
    caption: str
    unit: str = "nats"

    def to_html(self) -> str:
        """Return a self-contained page, with all text escaped."""
        data = {"maps": [map_values(self.tokens, self.caption)], "unit": self.unit}
        return rendered("heat_map.html", self.caption, data=data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        # In a frame without the notebook's origin: a completion is untrusted, and neither side's style meets the other.
        lines = self.tokens.prompt.count("\n") // 4 + sum(map(len, self.tokens.text)) // 90
        height = min(760, 450 + 26 * lines)  # with room for a tooltip
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" title="heat-map of a completion" width="100%" height="{height}" '
            f'frameborder="0" srcdoc="{page}"></iframe>'
        )


def heat_map(
    student: nn.Module | str | os.PathLike[str],
    teacher: Teacher | nn.Module | str | os.PathLike[str],
    prompt: Prompt,
    completion: str | Sequence[int] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    beta: float = 0.5,
    divergence: str = "jsd",
    divergence_options: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    top: int = TOP,
) -> HeatMap:
    """Compare student and teacher at each token of a completion.

    Causal LMs and encoder-decoders are compared as in training, and text becomes tokens as there.

    Args:
        student: The model, or its name or folder.
        teacher: A Teacher, a model, or its name or folder; its parameters stop requiring gradients.
        prompt: Text, messages (with the tokenizer's chat template), or token ids.
        completion: Text, or token ids if the prompt is; None for the student's own greedy one.
        tokenizer: The student's; by default the one stored with it.
        beta: See `token_divergence`.
        divergence: See `token_divergence`.
        divergence_options: See `token_divergence`.
        temperature: See `token_divergence`; it also divides the logits of the probabilities shown.
        max_new_tokens: The longest completion to generate.
        top: How many of each model's most probable tokens to show.

    Raises:
        GKDTeacherError: See `pair.pair`; or the teacher can't score this completion.
        GKDDataError: No completion to compare, one that does not fit the prompt, or one longer than a context.
        GKDConfigError: An option is out of range, or the student can't be loaded.
    """
    models = pair(student, teacher, tokenizer)
    ids, labels = _sequence(models, prompt, completion, max_new_tokens)
    batch = models.batch([(ids, labels)], is_on_policy=completion is None)

    def compare(student_signal: StudentSignal, teacher_signal: Signal) -> list[TokenMap]:
        result = token_divergence(
            student_signal,
            teacher_signal,
            beta=beta,
            divergence=divergence,
            divergence_options=divergence_options,
            temperature=temperature,
        )
        return token_maps(
            batch,
            student_signal,
            teacher_signal,
            result,
            [0],
            models.tokenizer,
            temperature=temperature,
            top=top,
        )

    maps = models.compare(batch, compare)
    if not maps:
        raise GKDDataError("expected a completion of at least one token; got an empty one")
    caption = "By the student" if completion is None else "Given completion"
    return HeatMap(maps[0], caption, unit_of(divergence, vocabulary_modes(models.teacher)))


def _sequence(
    models: Pair, prompt: Prompt, completion: str | Sequence[int] | None, max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """Return token ids and labels, of the completion that was given or of the student's own."""
    row = _row(prompt, completion, models.is_encoder_decoder)
    prepared = prepared_row(models, row, max_new_tokens, is_generating=completion is None)
    if completion is not None:
        return prepared.input_ids, prepared.labels
    prompt_ids = prompt_of(prepared)
    [generated] = models.completed([prompt_ids], max_new_tokens)
    return completed(models, prompt_ids, generated.token_ids)


class Reading(Protocol):
    """How rows are turned into tokens for a student: what `Pair` says of it, or what its files say."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...
    @property
    def stop_ids(self) -> list[int]: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def is_encoder_decoder(self) -> bool: ...


def prepared_row(models: Reading, row: Mapping[str, Any], max_new_tokens: int, *, is_generating: bool) -> PreparedRow:
    """Return a row of any format of training as tokens; raise GKDDataError if it can't be used."""
    rules = RowRules(
        stop_ids=frozenset(models.stop_ids),
        max_length=None,
        max_new_tokens=max_new_tokens,
        train_on="last_turn",
        is_generating=is_generating,
        needs_completion=False,
        needs_prompt=is_generating,
        vocab_size=models.vocab_size,
        is_encoder_decoder=models.is_encoder_decoder,
    )
    try:
        return RowPreparer.create(models.tokenizer, rules, None).prepare(row)
    except RowDropped as dropped:
        raise GKDDataError(f"the row can't be used: {dropped.reason}") from dropped


def prompt_of(prepared: PreparedRow) -> list[int]:
    """Return the tokens for which a completion can be generated."""
    return list(prepared.prompt_ids or prepared.input_ids[: prepared.n_prompt])


def completed(models: Pair, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a prompt with a generated completion."""
    if models.is_encoder_decoder:
        return list(prompt_ids), list(token_ids)
    return [*prompt_ids, *token_ids], [*[IGNORE_INDEX] * len(prompt_ids), *token_ids]


def _row(prompt: Prompt, completion: str | Sequence[int] | None, is_encoder_decoder: bool) -> dict[str, Any]:
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.flatten().tolist()
    if isinstance(completion, torch.Tensor):
        completion = completion.flatten().tolist()
    if not isinstance(prompt, str) and len(prompt) == 0:
        raise GKDDataError("expected a prompt; got an empty one")
    has_ids = not isinstance(prompt, str) and isinstance(prompt[0], Integral)
    if completion is not None and isinstance(completion, str) == has_ids:
        raise GKDDataError(
            "expected a prompt and a completion that are both text (or messages and text), or both token ids; got one "
            f"of each: {type(prompt).__name__} and {type(completion).__name__}"
        )
    if has_ids:
        prompt = [int(token_id) for token_id in cast("Sequence[int]", prompt)]
        given = [] if completion is None else [int(token_id) for token_id in completion]
        if completion is not None and not given:
            raise GKDDataError("expected a completion of at least one token; got an empty one")
        if is_encoder_decoder:
            return {"input_ids": list(prompt), "labels": given or None}
        return {"input_ids": [*prompt, *given], "labels": [*[IGNORE_INDEX] * len(prompt), *given]}
    if completion is None:
        return {"prompt": prompt}
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}

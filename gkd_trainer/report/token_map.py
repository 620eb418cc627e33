"""A completion token by token: how far student and teacher are apart, and what each would have written."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd_trainer.batch_keys import has_decoder_inputs
from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.pieces import text_pieces, token_text, whole_text
from gkd_trainer.report.predictions import top_tokens
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.types import TokenBatch

TOP = 5
"""How many of each model's most probable tokens are kept."""

Top = tuple[tuple[str, float], ...]
"""A model's most probable tokens and their probabilities, most probable first."""

Numbers = tuple[float | None, ...]

Ranks = tuple[int | None, ...]

_PROMPT_CHARACTERS = 4000


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one completion; every tuple has one entry per token, None for a number that is unknown.

    Attributes:
        prompt: The text before the completion; if it is long, its beginning is left out.
        is_on_policy: Whether the student wrote the completion.
        is_cut: Whether further tokens were left out.
        text: The text of each token (see `pieces.text_pieces`).
        divergence: in nats, if it has a unit; None for a token that was not compared, such as those of another turn.
        student_entropy: in nats.
        teacher_entropy: in nats.
        acceptance: Σ min(p, q) (see TokenDivergence).
        student_p: the probability that the student gave to the token.
        teacher_p: likewise for the teacher; None if it gave only other top tokens.
        student_top: the student's most probable tokens.
        teacher_top: the teacher's.
        student_rank: the place of the token in `student_top`, from 0; None if it is not there, or in an older file.
        teacher_rank: likewise in `teacher_top`.
    """

    prompt: str
    is_on_policy: bool
    is_cut: bool
    text: tuple[str, ...]
    divergence: Numbers
    student_entropy: Numbers
    teacher_entropy: Numbers
    acceptance: Numbers
    student_p: Numbers
    teacher_p: Numbers
    student_top: tuple[Top, ...]
    teacher_top: tuple[Top, ...]
    student_rank: Ranks
    teacher_rank: Ranks

    def __len__(self) -> int:
        return len(self.text)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_json(cls, values: Any) -> TokenMap:
        """Return the map of what `to_json` returned, after JSON; raise GKDDataError for anything else."""
        try:
            given: dict[str, Any] = {name: bool(values[name]) for name in ("is_on_policy", "is_cut")}
            given |= {"prompt": str(values["prompt"]), "text": tuple(map(str, values["text"]))}
            given |= {name: tuple(map(_number, values[name])) for name in NUMBERS}
            given |= {name: tuple(map(_top, values[name])) for name in TOPS}
            # Older files have none.
            given |= {name: tuple(map(_rank, values.get(name, [None] * len(given["text"])))) for name in RANKS}
            token_map = cls(**given)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise GKDDataError(f"expected a recorded sample with {_names()}; got something else ({error!r})") from error
        if {len(getattr(token_map, name)) for name in (*NUMBERS, *TOPS, *RANKS)} != {len(token_map)}:
            raise GKDDataError("expected a recorded sample whose lists have one entry per token; got several lengths")
        return token_map


NUMBERS = ("divergence", "student_entropy", "teacher_entropy", "acceptance", "student_p", "teacher_p")
"""The fields with a number per token."""

TOPS = ("student_top", "teacher_top")
"""The fields with top tokens per token."""

RANKS = ("student_rank", "teacher_rank")
"""The fields with the token's place among the top tokens."""


def token_maps(
    batch: TokenBatch,
    student: StudentSignal,
    teacher: Signal,
    result: TokenDivergence,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    top: int = TOP,
) -> list[TokenMap]:
    """Return the maps of some samples of a batch; those without scored tokens are left out.

    Args:
        batch: The batch that both models were compared on.
        student: The student's predictions at its scored positions.
        teacher: The teacher's.
        result: Their comparison.
        rows: The samples.
        tokenizer: Turns tokens into text; None shows their ids.
        temperature: That of the comparison, for the probabilities.
        max_tokens: The longest map; None is no limit.
        top: How many of each model's top tokens to keep.
    """
    rows_N = batch.rows_N.tolist()
    maps = []
    for row in rows:
        scored = [position for position, other in enumerate(rows_N) if other == row]
        if not scored:
            continue
        columns = [int(column) + batch.label_offset for column in batch.columns_N[scored].tolist()]
        is_cut = max_tokens is not None and columns[-1] - columns[0] >= max_tokens
        if is_cut and max_tokens is not None:
            scored = [n for n, column in zip(scored, columns, strict=True) if column - columns[0] < max_tokens]
            columns = columns[: len(scored)]
        index_n = torch.tensor(scored, device=batch.rows_N.device)
        values = _values(batch.targets_N, student, teacher, result, index_n, tokenizer, temperature, top)
        maps.append(_token_map(batch, row, columns, values, tokenizer, is_cut=is_cut))
    return maps


def _values(
    targets_N: Tensor,
    student: StudentSignal,
    teacher: Signal,
    result: TokenDivergence,
    index_n: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    temperature: float,
    top: int,
) -> dict[str, list[Any]]:
    measured = {
        "divergence": result.values_N,
        "student_entropy": result.student_entropy_N,
        "teacher_entropy": result.teacher_entropy_N,
        "acceptance": result.acceptance_N,
    }
    values: dict[str, list[Any]] = {
        name: [None] * len(index_n) if value_N is None else _rounded(value_N.detach()[index_n])
        for name, value_N in measured.items()
    }
    texts: dict[int, str] = {}
    targets = targets_N[index_n].tolist()
    for side, signal in (("student", student), ("teacher", teacher)):
        found = top_tokens(signal, index_n, targets_N[index_n], top, temperature)
        values[f"{side}_p"] = _rounded(found.target_p_N)
        tops, ranks = [], []
        for target, ids, probabilities in zip(targets, found.ids_NK.tolist(), found.p_NK.tolist(), strict=True):
            pairs = [(token_id, p) for token_id, p in zip(ids, probabilities, strict=True) if p > 0]
            for token_id, _ in pairs:
                if token_id not in texts:
                    texts[token_id] = token_text(token_id, tokenizer)
            tops.append(tuple((texts[token_id], _significant(p)) for token_id, p in pairs))
            # By id: several tokens may have the same text.
            ranks.append(next((rank for rank, (token_id, _) in enumerate(pairs) if token_id == target), None))
        values[f"{side}_top"], values[f"{side}_rank"] = tops, ranks
    return values


def _token_map(
    batch: TokenBatch,
    row: int,
    columns: list[int],
    values: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    is_cut: bool,
) -> TokenMap:
    ids, mask = batch.model_inputs["input_ids"][row], batch.model_inputs.get("attention_mask")
    if has_decoder_inputs(batch.model_inputs):
        prompt_ids = (ids if mask is None else ids[mask[row] != 0]).tolist()
        token_ids, spread = batch.labels_BL[row, columns].tolist(), values
    else:
        first, last = columns[0], columns[-1]
        prompt_ids, token_ids = ids[:first].tolist(), ids[first : last + 1].tolist()
        place = {column - first: index for index, column in enumerate(columns)}
        missing = {name: () if name in TOPS else None for name in values}
        spread = {
            name: [found[place[index]] if index in place else missing[name] for index in range(len(token_ids))]
            for name, found in values.items()
        }
    prompt = whole_text(prompt_ids[-_PROMPT_CHARACTERS:], tokenizer)
    return TokenMap(
        prompt=prompt if len(prompt) <= _PROMPT_CHARACTERS else f"…{prompt[-_PROMPT_CHARACTERS:]}",
        is_on_policy=bool(batch.is_on_policy_B[row]),
        is_cut=is_cut,
        text=tuple(text_pieces(token_ids, tokenizer)),
        **{name: tuple(found) for name, found in spread.items()},
    )


def _rounded(values_N: Tensor) -> list[float | None]:
    return [_significant(value) if math.isfinite(value) else None for value in values_N.double().tolist()]


def _significant(value: float) -> float:
    """Return four significant digits: more would only lengthen files."""
    return float(f"{value:.4g}")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _rank(value: Any) -> int | None:
    return None if value is None else operator.index(value)


def _top(pairs: Any) -> Top:
    return tuple((str(text), float(p)) for text, p in pairs)


def _names() -> str:
    return ", ".join(field.name for field in fields(TokenMap))

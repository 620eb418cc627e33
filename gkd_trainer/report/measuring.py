"""A student measured against its teacher, on given completions and on its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data.gsm8k import INSTRUCTION, is_correct, is_number, is_problem, to_conversation
from gkd_trainer.data.rows import has_format, no_format
from gkd_trainer.divergence import TokenDivergence, token_divergence
from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.fitting import prepared_prompt
from gkd_trainer.report.heat_maps import completed, prompt_of
from gkd_trainer.report.pair import Pair
from gkd_trainer.report.pieces import whole_text
from gkd_trainer.report.token_map import TokenMap, token_maps
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.types import Completion, TokenBatch

GROUND_TRUTH = "ground_truth"
"""The column of a row's true answer, as `gsm8k.to_prompt` makes it."""


@dataclass(frozen=True)
class Measure:
    """A measurement: its name, its unit, and whether more of it is better (None: neither)."""

    name: str
    unit: str
    is_more_better: bool | None


MEASURES: dict[str, Measure] = {
    "data_forward_kl": Measure("forward KL, data's text", "nats per token", False),
    "data_reverse_kl": Measure("reverse KL, data's text", "nats per token", False),
    "data_agreement": Measure("same top token, data's text", "share of tokens", True),
    "data_acceptance": Measure("acceptance, data's text", "share of tokens", True),
    "own_forward_kl": Measure("forward KL, own text", "nats per token", False),
    "own_reverse_kl": Measure("reverse KL, own text", "nats per token", False),
    "own_agreement": Measure("same top token, own text", "share of tokens", True),
    "own_acceptance": Measure("acceptance, own text", "share of tokens", True),
    "task_score": Measure("task score", "share of completions", True),
    "length": Measure("length of own completions", "tokens", None),
    "cut_off": Measure("own completions cut off", "share of completions", None),
}
"""The measurements by key, in the order in which they are shown."""


@dataclass(frozen=True)
class Sample:
    """A prompt, the student's completion (None for an empty one), and whether it is right (None if unknown)."""

    prompt: str
    tokens: TokenMap | None
    text: str
    is_finished: bool
    is_right: bool | None


@dataclass(frozen=True)
class MeasuredStudent:
    """The measures of a student by the keys of MEASURES, as far as it has them, and its first completions."""

    name: str
    measures: Mapping[str, float]
    samples: tuple[Sample, ...]


def usable_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in a format of training; GSM8K's own columns become conversations with a GROUND_TRUTH.

    Raises GKDDataError if there are none, or some in no format.
    """
    if not rows:
        raise GKDDataError("expected rows to compare on; the dataset has none")
    return [dict(row) if has_format(row) else _of_question(row) for row in rows]


def measured(
    models: Pair,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    kept: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    shown: int = 4,
) -> MeasuredStudent:
    """Measure a student.

    Each token has the same weight in a mean. Own completions are greedy.

    Args:
        models: The student and its teacher.
        name: The student's name.
        rows: From `usable_rows`; those without a completion are only completed by the student.
        kept: The rows to measure on, by index, such as those of `fitting.fitting_rows`; None for all.
        max_new_tokens: The longest completion.
        batch_size: How many rows are scored at once.
        shown: How many samples to return.

    Raises:
        GKDError: A row can't be used, is longer than a context, or the teacher can't score it.
    """
    kept = range(len(rows)) if kept is None else kept
    prepared = [prepared_prompt(models, rows[index], index, max_new_tokens) for index in kept]
    rows = [rows[index] for index in kept]
    in_data = [(row.input_ids, row.labels) for row in prepared if any(label != IGNORE_INDEX for label in row.labels)]
    measures = _means(models, "data", in_data, batch_size, is_on_policy=False)
    prompts = [prompt_of(row) for row in prepared]
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        completions += models.completed(prompts[start : start + batch_size], max_new_tokens)
    texts = [_text(models, item) for item in completions]
    right = [_is_right(text, row) for text, row in zip(texts, rows, strict=True)]
    own = {
        index: completed(models, prompts[index], item.token_ids)
        for index, item in enumerate(completions)
        if item.token_ids
    }
    maps: dict[int, TokenMap] = {}
    of_own = _means(models, "own", list(own.values()), batch_size, is_on_policy=True, keep=maps, shown=shown)
    by_row = {row: maps.get(place) for place, row in enumerate(own)}
    samples = tuple(
        Sample(
            whole_text(prompts[row], models.tokenizer),
            by_row.get(row),
            texts[row],
            completions[row].is_finished,
            right[row],
        )
        for row in range(min(shown, len(rows)))
    )
    return MeasuredStudent(name, measures | of_own | _of_completions(completions, right), samples)


def _of_completions(completions: Sequence[Completion], right: Sequence[bool | None]) -> dict[str, float]:
    known = [each for each in right if each is not None]
    return {
        **({"task_score": sum(known) / len(known)} if known else {}),
        "length": sum(len(item.token_ids) for item in completions) / len(completions),
        "cut_off": sum(not item.is_finished for item in completions) / len(completions),
    }


def _is_right(text: str, row: Mapping[str, Any]) -> bool | None:
    truth = row.get(GROUND_TRUTH)
    return is_correct(text, str(truth)) if is_number(str(truth)) else None


def _means(
    models: Pair,
    prefix: str,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    *,
    is_on_policy: bool,
    keep: dict[int, TokenMap] | None = None,
    shown: int = 0,
) -> dict[str, float]:
    """Return the means over all tokens of sequences; `keep` gets the first maps, by index, coloured by reverse KL."""
    sums = dict.fromkeys(("forward_kl", "reverse_kl", "agreement", "acceptance"), 0.0)
    count = 0
    for start in range(0, len(sequences), batch_size):
        batch = models.batch(sequences[start : start + batch_size], is_on_policy=is_on_policy)
        rows = range(min(len(batch.labels_BL), max(0, shown - start)))
        forward, reverse, maps = models.compare(batch, functools.partial(_both_kls, batch, models.tokenizer, rows))
        if keep is not None:
            keep.update({start + row: token_map for row, token_map in maps.items()})
        count += batch.n_scored
        for name, value_N in (
            ("forward_kl", forward.values_N),
            ("reverse_kl", reverse.values_N),
            ("agreement", forward.agrees_N),
            ("acceptance", forward.acceptance_N),
        ):
            if value_N is not None:
                sums[name] += float(value_N.double().sum())
    return {f"{prefix}_{name}": total / count for name, total in sums.items()} if count else {}


def _both_kls(
    batch: TokenBatch,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[int],
    student: StudentSignal,
    teacher: Signal,
) -> tuple[TokenDivergence, TokenDivergence, dict[int, TokenMap]]:
    forward, reverse = (token_divergence(student, teacher, beta=beta) for beta in (0.0, 1.0))
    # One by one: a sample at which the teacher is compared nowhere has no map.
    found = {row: token_maps(batch, student, teacher, reverse, [row], tokenizer) for row in rows}
    return forward, reverse, {row: maps[0] for row, maps in found.items() if maps}


def _of_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of GSM8K as a conversation, and any other question and answer as a prompt and a completion."""
    others = {name: value for name, value in row.items() if name not in ("question", "answer")}
    if is_problem(row):
        return {**others, **to_conversation(row, INSTRUCTION)}
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return {**others, "prompt": row["question"], "completion": row["answer"]}
    raise GKDDataError(no_format(row))


def _text(models: Pair, completion: Completion) -> str:
    if models.tokenizer is None:
        return whole_text(completion.token_ids, None)
    return str(models.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))

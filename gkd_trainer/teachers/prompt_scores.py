"""vLLM's scores of a prompt's tokens (`prompt_logprobs`): the sequences to ask for, and reading and comparing answers.

Shapes: B batch, L length, K top tokens, C candidates of an answer, P scored positions of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from gkd_trainer.batch_keys import MEDIA_INPUTS
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import TokenBatch
from gkd_trainer.vllm_answers import ScoreAnswer

_MINUS_INFINITY = -9999.0
"""vLLM's number for a log-prob of -inf, which JSON can't hold."""

_EXCESS = 1e-3
"""How far rounding may raise a log-prob above 0, or the mass of the top tokens above 1."""

_PADDING = 10
"""How many times its tokenizer's tokens a model's head has at most, padding included; usually hardly more than once."""

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


class NotLogProbsError(ValueError):
    """Scores that no distribution has, such as logits."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids up to the last scored one, and the indices of the scored ones."""

    token_ids: list[int]
    targets_P: _Ints


@dataclass(frozen=True)
class TopScores:
    """The top tokens of the distribution at each scored token, most probable first."""

    ids_PK: _Ints
    log_p_PK: _Floats

    def first(self, count: int) -> TopScores:
        """Return the scores of the first `count` positions."""
        return TopScores(self.ids_PK[:count], self.log_p_PK[:count])


@dataclass(frozen=True)
class Witness:
    """A fixed text in tokens, and a teacher's scores of it, by which it is recognised if its weights are unknown."""

    token_ids: list[int]
    scores: TopScores


def fully_scored(token_ids: list[int]) -> TokenSequence:
    """Return a sequence that is scored at every token except its first."""
    return TokenSequence(token_ids, np.arange(1, len(token_ids)))


def sequences_of(batch: TokenBatch) -> list[TokenSequence]:
    """Return the sequences of a batch that have tokens to score, in order.

    Raises GKDDataError if the batch holds more than token ids, or trains on a token without a distribution.
    """
    if media := sorted(MEDIA_INPUTS & batch.model_inputs.keys()):
        raise GKDDataError(
            f"a teacher behind a server or in a cache knows only token ids, but this batch also holds "
            f"{', '.join(media)}: it would score the text without them. Use a teacher in this process"
        )
    host = batch.on_host
    ids_BL = host.model_inputs["input_ids"].numpy()
    is_target_BL = host.is_scored_BL.roll(host.label_offset, dims=1).numpy()
    mask_BL = host.model_inputs.get("attention_mask")
    is_real_BL = np.ones_like(is_target_BL) if mask_BL is None else mask_BL.bool().numpy()
    position_ids_BL = host.model_inputs.get("position_ids")
    is_start_BL = np.zeros_like(is_target_BL) if position_ids_BL is None else position_ids_BL.numpy() == 0
    if (is_target_BL & ~is_real_BL).any():
        raise GKDDataError("the attention mask hides tokens that are trained on: set their labels to -100")
    sequences = []
    for row in np.flatnonzero(is_target_BL.any(axis=1)):
        real_indices = np.flatnonzero(is_real_BL[row])
        for indices in np.split(real_indices, np.flatnonzero(is_start_BL[row, real_indices])):
            targets_P = np.flatnonzero(is_target_BL[row, indices])
            if targets_P.size == 0:
                continue
            if targets_P[0] == 0:
                raise GKDDataError(
                    f"sample {row} of a batch trains on the first token of a sequence, for which the "
                    "teacher has no distribution: set its label to -100, or begin with a bos token"
                )
            sequences.append(TokenSequence(ids_BL[row, indices[: targets_P[-1] + 1]].tolist(), targets_P))
    return sequences


def parse_scores(answer: Any, asked: Sequence[TokenSequence], top_k: int) -> list[TopScores]:
    """Return the scores of the sequences `asked`, in order.

    Raises:
        ValueError: The answer is invalid: NotLogProbsError if it holds numbers other than log-probs.
    """
    choices = sorted(ScoreAnswer.parse(answer).choices, key=lambda choice: choice.index)
    indices = [choice.index for choice in choices]
    if indices != list(range(len(asked))):
        raise ValueError(f"{len(asked)} prompts were sent, but the answer has the choices {indices}")
    return [
        _parse_sequence(choice.prompt_logprobs, sequence, top_k)
        for choice, sequence in zip(choices, asked, strict=True)
    ]


def check_mass(scores: TopScores, n_tokens: int) -> None:
    """Raise NotLogProbsError if a position's top tokens have less mass than those of a uniform distribution.

    `n_tokens` is the size of the tokenizer; the model's head may be larger.
    """
    mass = np.exp(scores.log_p_PK).sum(axis=1).min()
    least = scores.log_p_PK.shape[1] / (_PADDING * n_tokens)
    if mass < least:
        raise NotLogProbsError(
            f"the {scores.log_p_PK.shape[1]} most probable tokens of a position have a mass of {mass:.1e}, but those "
            f"of a model with {n_tokens} tokens must have at least {least:.1e}"
        )


def _parse_sequence(positions: Sequence[Any], sequence: TokenSequence, top_k: int) -> TopScores:
    """Return the scores in `prompt_logprobs`, whose entry i holds {id: {"logprob": ...}} for the prompt's token i."""
    if len(positions) != len(sequence.token_ids):
        raise ValueError(f"{len(sequence.token_ids)} positions were sent, but the answer has {len(positions)}")
    if positions[0] is not None:
        raise ValueError("the first token of a prompt has scores, although nothing precedes it")
    scored = [positions[target] for target in sequence.targets_P]
    counts_P = np.array([len(entries) for entries in scored])
    if counts_P.min() < top_k or counts_P.max() > top_k + 1:
        raise ValueError(
            f"expected {top_k} or {top_k + 1} tokens per position; got {counts_P.min()} to {counts_P.max()}"
        )
    # vLLM also gives the prompt's own token: a position has one more entry if that is not in the top k.
    is_entry_PC = np.arange(top_k + 1) < counts_P[:, None]
    ids_PC = np.full(is_entry_PC.shape, -1, dtype=np.int64)
    ids_PC[is_entry_PC] = np.fromiter(map(int, chain.from_iterable(scored)), np.int64)
    log_probs = [entry["logprob"] for entries in scored for entry in entries.values()]
    if not {float, int}.issuperset(map(type, log_probs)):
        raise ValueError("a log-prob is not a number")
    log_p_PC = np.full(is_entry_PC.shape, -np.inf)
    log_p_PC[is_entry_PC] = np.fromiter(log_probs, float, len(log_probs))

    if ids_PC[is_entry_PC].min() < 0:
        raise ValueError(f"a token id is negative: {ids_PC[is_entry_PC].min()}")
    is_own_PC = ids_PC == np.array(sequence.token_ids)[sequence.targets_P][:, None]
    if not (is_own_PC.sum(axis=1) == 1).all():
        raise ValueError("a position has no score for the prompt's own token")
    if not np.isfinite(log_p_PC[is_entry_PC]).all():
        raise ValueError("a log-prob is not finite")
    if log_p_PC[is_entry_PC].max() > _EXCESS:
        raise NotLogProbsError(f"a log-prob of {log_p_PC[is_entry_PC].max():.3g} is above 0")

    log_p_PC[log_p_PC <= _MINUS_INFINITY] = -np.inf
    is_extra_PC = is_own_PC & is_entry_PC[:, -1:]
    # Sorted by log-prob; entries outside the top k come last.
    order_PC = np.lexsort((-log_p_PC, is_extra_PC | ~is_entry_PC))
    ids_PK = np.take_along_axis(ids_PC, order_PC, axis=1)[:, :top_k]
    log_p_PK = np.take_along_axis(log_p_PC, order_PC, axis=1)[:, :top_k]
    mass = np.exp(log_p_PK).sum(axis=1).max()
    if mass > 1 + _EXCESS:
        raise NotLogProbsError(f"the top {top_k} tokens of a position have a mass of {mass:.3f}, more than 1")
    return TopScores(ids_PK, log_p_PK)


def total_variation(one: TopScores, other: TopScores) -> float:
    """Return the smallest total variation of two distributions with these top tokens, averaged over positions."""
    return max(_excess(one, other), _excess(other, one))


def _excess(one: TopScores, other: TopScores) -> float:
    """Return the mean mass that `one` puts on its top tokens in excess of the most that `other` may put there."""
    is_same_PKK = one.ids_PK[:, :, None] == other.ids_PK[:, None, :]
    p_PK, others_p_PK = np.exp(one.log_p_PK), np.exp(other.log_p_PK)
    # A token outside the top k has at most the smallest probability inside it.
    most_PK = np.where(
        is_same_PKK.any(axis=2), (is_same_PKK * others_p_PK[:, None, :]).sum(axis=2), others_p_PK.min(axis=1)[:, None]
    )
    return float(np.maximum(p_PK - most_PK, 0).sum(axis=1).mean())

"""Several teachers: their signals as groups of terms, and their divergences compared one teacher at a time.

Shapes: N tokens trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gkd_trainer.divergence.result import TokenDivergence, joined, mixed_loss, reordered, weighted_sum
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import (
    GroupedSignal,
    Head,
    HiddenSignal,
    LogitsSignal,
    MappedSignal,
    Signal,
    StudentSignal,
    SummedSignal,
    TopKSignal,
    VocabularyMap,
    scored_positions,
)

TiledSignal = HiddenSignal | TopKSignal
"""A teacher's predictions that can be compared tile by tile with a student's hidden states."""


@dataclass(frozen=True)
class Term:
    """One of the teachers of a group, and the weight of its divergence there; `mapping` is for another vocabulary."""

    signal: TiledSignal
    weight: float = 1.0
    mapping: VocabularyMap | None = None


@dataclass(frozen=True)
class Form:
    """A term without its tensors. `head` is its head's (scale, softcap, vocab_size); None for top tokens."""

    head: tuple[float, float | None, int | None] | None
    vocab_size: int
    weight: float
    mapping: VocabularyMap | None

    @classmethod
    def of(cls, term: Term) -> Form:
        """Return the form of a term."""
        signal = term.signal
        if isinstance(signal, TopKSignal):
            return cls(None, signal.vocab_size, term.weight, term.mapping)
        head = signal.head
        return cls((head.scale, head.softcap, head.vocab_size), signal.vocab_size, term.weight, term.mapping)

    def filled(self, tensors: Iterator[Tensor]) -> Term:
        """Return the term, taking its tensors from an iterator in the order of `tensors_of`."""
        if self.head is None:
            return Term(TopKSignal(next(tensors), next(tensors), self.vocab_size), self.weight)
        hidden_NH, weight_VH, bias_V = next(tensors), next(tensors), next(tensors)
        return Term(HiddenSignal(hidden_NH, Head(weight_VH, bias_V, *self.head)), self.weight, self.mapping)


def tensors_of(signal: TiledSignal) -> tuple[Tensor | None, ...]:
    """Return the tensors of a signal: ids and log-probs, or hidden states, weight and bias."""
    if isinstance(signal, TopKSignal):
        return signal.ids_NK, signal.log_p_NK
    return signal.hidden_NH, signal.head.weight_VH, signal.head.bias_V


def groups_of(teacher: Signal) -> list[tuple[Term, ...]] | None:
    """Return the terms of each group of a signal; one group if it is not grouped.

    None if a teacher gives logits, or signals are nested in another order than terms in groups.
    """
    groups = []
    for group in teacher.groups if isinstance(teacher, GroupedSignal) else (teacher,):
        terms, weights = (group.terms, group.weights) if isinstance(group, SummedSignal) else ((group,), (1.0,))
        found = []
        for term, weight in zip(terms, weights, strict=True):
            signal, mapping = (term.signal, term.mapping) if isinstance(term, MappedSignal) else (term, None)
            if not isinstance(signal, HiddenSignal | TopKSignal):
                return None
            found.append(Term(signal, weight, mapping))
        groups.append(tuple(found))
    return groups


def check_groups(teacher: GroupedSignal) -> None:
    """Raise GKDConfigError if a signal's groups don't make up its positions; the order itself is not read."""
    sizes = [scored_positions(group) for group in teacher.groups]
    order_N = teacher.order_N
    if not sizes or order_N.ndim != 1 or order_N.dtype != torch.long or sum(sizes) != len(order_N):
        raise GKDConfigError(
            "grouped teachers need order_N, an int64 permutation of the N positions with the positions of each group "
            f"together; got {order_N.dtype} {list(order_N.shape)} and groups of {sizes} positions"
        )
    for group in teacher.groups:
        if isinstance(group, GroupedSignal):
            raise GKDConfigError("a group must hold the predictions of one teacher or a sum; got groups inside a group")
        if isinstance(group, SummedSignal):
            check_terms(group)


def check_terms(teacher: SummedSignal) -> None:
    """Raise GKDConfigError if a sum's terms are not at the same positions, or a weight is not positive and finite."""
    sizes = [scored_positions(term) for term in teacher.terms]
    if not sizes or len(set(sizes)) > 1:
        raise GKDConfigError(f"summed teachers must be scored at the same positions; got N = {sizes}")
    if len(teacher.weights) != len(sizes) or not all(0 < weight < math.inf for weight in teacher.weights):
        raise GKDConfigError(
            f"summed teachers need a positive and finite weight for each of {len(sizes)}; got {list(teacher.weights)}"
        )
    if any(isinstance(term, GroupedSignal | SummedSignal) for term in teacher.terms):
        raise GKDConfigError("a term of a sum must hold the predictions of one teacher; got several inside a term")


class Compare(Protocol):
    """Compares a student with a teacher, as `loss.token_divergence` does with its other options set."""

    def __call__(
        self,
        student: StudentSignal,
        teacher: Signal,
        *,
        labels_N: Tensor | None = None,
        label_weight_N: Tensor | None = None,
    ) -> TokenDivergence:
        """Return the divergence of each token."""
        ...


def separate_divergences(
    student: StudentSignal,
    teacher: GroupedSignal | SummedSignal,
    compare: Compare,
    *,
    labels_N: Tensor | None,
    label_weight_N: Tensor | None,
) -> TokenDivergence:
    """Compare a student with several teachers of any kind, with one call of `compare` for each.

    The terms of a sum project the student's hidden states, if it has any, once per term.
    """
    if isinstance(teacher, SummedSignal):
        *others, last = teacher.terms
        parts = [compare(student, term) for term in others]
        parts.append(compare(student, last, labels_N=labels_N))
        result = weighted_sum(parts, teacher.weights)
        if label_weight_N is None or result.cross_entropy_N is None:
            return replace(result, loss_N=None)
        return replace(result, loss_N=mixed_loss(result.values_N, result.cross_entropy_N, label_weight_N))
    parts = []
    for positions, group in non_empty(teacher.groups, teacher.order_N):
        labels, weights = (None if each is None else each[positions] for each in (labels_N, label_weight_N))
        part = compare(_at(student, positions), group, labels_N=labels, label_weight_N=weights)
        parts.append(replace(part, terms_NT=None))
    return reordered(joined(parts), teacher.order_N)


def non_empty(groups: Sequence[Signal], order_N: Tensor) -> Iterator[tuple[Tensor, Signal]]:
    """Yield the positions and the signal of each group that has any; the first if none has."""
    sizes = [scored_positions(group) for group in groups]
    for positions, group in zip(order_N.split(sizes), groups, strict=True):
        if len(positions) or (not len(order_N) and group is groups[0]):
            yield positions, group


def _at(student: StudentSignal, positions: Tensor) -> StudentSignal:
    if isinstance(student, HiddenSignal):
        return replace(student, hidden_NH=torch.index_select(student.hidden_NH, 0, positions))
    return LogitsSignal(torch.index_select(student.logits_NV, 0, positions))

"""A model's predictions at the positions trained on: hidden states with a head, logits, or the top tokens.

A teacher with another vocabulary also gives a map between the two. Several teachers' predictions are grouped by
position, or summed.

Shapes: N tokens trained on, V vocabulary, H hidden width, K top tokens of a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """How final hidden states become logits: softcap·tanh(scale·(h·Wᵀ + b) / softcap).

    `weight_VH` and `bias_V` are float tensors; `scale` multiplies the logits; `softcap` None leaves them unbounded.
    Predictions are over the first `vocab_size` tokens, or all if None (see `sliced`).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def sliced(self, vocab_size: int) -> Head:
        """Return the head of the first `vocab_size` tokens.

        The weight itself is not cut: autograd would then allocate a second gradient of full size.
        """
        used = len(self.weight_VH) if self.vocab_size is None else self.vocab_size
        return replace(self, vocab_size=min(vocab_size, used))

    def cut(self) -> Head:
        """Return the head with its weight cut to the tokens predicted over, sharing memory with this one."""
        if self.vocab_size is None:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[: self.vocab_size]
        return Head(self.weight_VH[: self.vocab_size], bias_V, self.scale, self.softcap)

    def logits(self, hidden_H: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H], in float32 (float64 if either is float64).

        Inputs are upcast before the product: logits rounded to bf16 give a wrong gradient.
        """
        dtype = torch.promote_types(torch.promote_types(hidden_H.dtype, self.weight_VH.dtype), torch.float32)
        head = self.cut()
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        logits_V = torch.nn.functional.linear(hidden_H.to(dtype), head.weight_VH.to(dtype), bias_V)
        if self.scale != 1.0:
            logits_V = logits_V * self.scale
        return logits_V if self.softcap is None else self.softcap * torch.tanh(logits_V / self.softcap)


@dataclass(frozen=True)
class HiddenSignal:
    """A model's predictions as final hidden states [N, H] with the head that turns them into logits."""

    hidden_NH: Tensor
    head: Head

    @property
    def vocab_size(self) -> int:
        """Number of tokens that are predicted over."""
        return self.head.weight_VH.shape[0] if self.head.vocab_size is None else self.head.vocab_size

    def sliced(self, vocab_size: int) -> HiddenSignal:
        """Return the same predictions over the first `vocab_size` tokens."""
        return HiddenSignal(self.hidden_NH, self.head.sliced(vocab_size))


@dataclass(frozen=True)
class LogitsSignal:
    """A model's predictions as logits [N, V]."""

    logits_NV: Tensor

    @property
    def vocab_size(self) -> int:
        """Number of tokens that are predicted over."""
        return self.logits_NV.shape[1]

    def sliced(self, vocab_size: int) -> LogitsSignal:
        """Return the same predictions over the first `vocab_size` tokens."""
        return LogitsSignal(self.logits_NV[:, :vocab_size])


@dataclass(frozen=True)
class TopKSignal:
    """A teacher's most probable tokens, with their log-probs over its whole vocabulary.

    `ids_NK` are int64 and distinct at each position; `log_p_NK` are at temperature 1 and not normalised over the K:
    their probabilities and the teacher's mass on all other tokens sum to one. An entry of -inf is absent, and its id is
    meaningless; without entries, a position says nothing. `vocab_size` is the number of tokens that the teacher
    predicts over.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    vocab_size: int

    def sliced(self, vocab_size: int) -> TopKSignal:
        """Return the same predictions over the first `vocab_size` tokens: entries beyond them become absent."""
        log_p_NK = self.log_p_NK.masked_fill(self.ids_NK >= vocab_size, -torch.inf)
        return TopKSignal(self.ids_NK, log_p_NK, vocab_size)


@dataclass(frozen=True)
class GroupedSignal:
    """The predictions of several teachers, each at positions of its own.

    `order_N` is a permutation of the N positions (int64): the first of them belong to the first of `groups`, in its
    order, the next to the second, and so on. A group may be empty.
    """

    order_N: Tensor
    groups: tuple[Signal, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that all of them predict over."""
        return min(group.vocab_size for group in self.groups)

    def sliced(self, vocab_size: int) -> GroupedSignal:
        """Return the same predictions over the first `vocab_size` tokens."""
        return GroupedSignal(self.order_N, tuple(group.sliced(vocab_size) for group in self.groups))


@dataclass(frozen=True)
class SummedSignal:
    """The predictions of several teachers, all at the same N positions; their divergences are summed.

    The sum is Σ weight·divergence, with one weight for each of `terms`, positive and finite.
    """

    terms: tuple[Signal, ...]
    weights: tuple[float, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that all of them predict over."""
        return min(term.vocab_size for term in self.terms)

    def sliced(self, vocab_size: int) -> SummedSignal:
        """Return the same predictions over the first `vocab_size` tokens."""
        return SummedSignal(tuple(term.sliced(vocab_size) for term in self.terms), self.weights)


StudentSignal = HiddenSignal | LogitsSignal
"""A student's predictions at the positions trained on: always the full distribution."""


MODES = ("matched", "next_byte", "uld", "gold")
"""How two vocabularies are compared: see `divergence.categories` for the first two, `divergence.uld` for the others."""


@dataclass(frozen=True)
class VocabularyMap:
    """How two vocabularies, a student's of V tokens and a teacher's of W, are compared.

    The token `student_ids_M[m]` is the teacher's `teacher_ids_M[m]`; each id occurs at most once. `student_group_V` and
    `teacher_group_W` are the group of each token in a partition of both vocabularies that does not need them to match,
    such as by first byte; groups are from 0 to `groups` - 1. All are int64. `mode` is one of MODES; "matched" compares
    groups where the teacher gives the M tokens less probability than `min_matched_mass`.
    """

    student_ids_M: Tensor
    teacher_ids_M: Tensor
    student_group_V: Tensor
    teacher_group_W: Tensor
    groups: int
    mode: str = "matched"
    min_matched_mass: float = 0.0
    _slices: dict[int, VocabularyMap] = field(init=False, default_factory=dict, repr=False, compare=False)

    @cached_property
    def student_rest(self) -> Tensor:
        """The student's tokens that the teacher lacks."""
        return _left_out(self.student_ids_M, self.student_group_V)

    @cached_property
    def teacher_rest(self) -> Tensor:
        """The teacher's tokens that the student lacks."""
        return _left_out(self.teacher_ids_M, self.teacher_group_W)

    def to(self, device: torch.device) -> VocabularyMap:
        """Return the map on a device."""
        moved = replace(
            self,
            student_ids_M=self.student_ids_M.to(device),
            teacher_ids_M=self.teacher_ids_M.to(device),
            student_group_V=self.student_group_V.to(device),
            teacher_group_W=self.teacher_group_W.to(device),
        )
        # Found here, where finding them does not wait for the device.
        vars(moved).update(student_rest=self.student_rest.to(device), teacher_rest=self.teacher_rest.to(device))
        return moved

    def sliced(self, student_size: int) -> VocabularyMap:
        """Return the map of the student's first `student_size` tokens; the same object for the same size."""
        if student_size >= len(self.student_group_V):
            return self
        if student_size not in self._slices:
            # The first time, this waits for the device.
            is_kept_M = self.student_ids_M < student_size
            self._slices[student_size] = replace(
                self,
                student_ids_M=self.student_ids_M[is_kept_M],
                teacher_ids_M=self.teacher_ids_M[is_kept_M],
                student_group_V=self.student_group_V[:student_size],
            )
        return self._slices[student_size]


def _left_out(ids_M: Tensor, of_V: Tensor) -> Tensor:
    is_left_V = torch.ones_like(of_V, dtype=torch.bool)
    is_left_V[ids_M] = False
    return is_left_V.nonzero()[:, 0]


@dataclass(frozen=True)
class MappedSignal:
    """The predictions of a teacher with another vocabulary, and how they compare with the student's.

    `signal` is over the teacher's W tokens, but the divergence is one of distributions over the student's.
    """

    signal: StudentSignal
    mapping: VocabularyMap

    @property
    def vocab_size(self) -> int:
        """Number of the student's tokens that are compared."""
        return len(self.mapping.student_group_V)

    def sliced(self, vocab_size: int) -> MappedSignal:
        """Return the same predictions, compared with the student's first `vocab_size` tokens."""
        return MappedSignal(self.signal, self.mapping.sliced(vocab_size))


PlainSignal = StudentSignal | TopKSignal | MappedSignal
"""One teacher's predictions at the positions trained on."""

Signal = PlainSignal | GroupedSignal | SummedSignal
"""The predictions of one or several teachers at the positions trained on."""


def plain_signals(signal: Signal) -> Iterator[PlainSignal]:
    """Yield the predictions of each teacher in a signal, in order."""
    if isinstance(signal, GroupedSignal | SummedSignal):
        for inner in signal.groups if isinstance(signal, GroupedSignal) else signal.terms:
            yield from plain_signals(inner)
    else:
        yield signal


def tensors_of(signal: PlainSignal) -> Iterator[Tensor]:
    """Yield the tensors of one teacher's predictions, and of its head."""
    if isinstance(signal, MappedSignal):
        signal = signal.signal
    if isinstance(signal, TopKSignal):
        yield from (signal.ids_NK, signal.log_p_NK)
    elif isinstance(signal, LogitsSignal):
        yield signal.logits_NV
    else:
        yield from (signal.hidden_NH, signal.head.weight_VH)
        if signal.head.bias_V is not None:
            yield signal.head.bias_V


def scored_positions(signal: Signal) -> int:
    """Return N, the number of positions that a signal has predictions for."""
    if isinstance(signal, GroupedSignal):
        return len(signal.order_N)
    if isinstance(signal, SummedSignal):
        return scored_positions(signal.terms[0])
    if isinstance(signal, MappedSignal):
        return scored_positions(signal.signal)
    if isinstance(signal, TopKSignal):
        return len(signal.ids_NK)
    return len(signal.hidden_NH if isinstance(signal, HiddenSignal) else signal.logits_NV)

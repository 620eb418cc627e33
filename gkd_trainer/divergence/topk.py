"""The divergence from a teacher's top tokens, with one category for all others.

Shapes: N tokens, R rows of logits (tokens compared at once), V vocabulary, K top tokens of the teacher, C = K + 1
categories, J the tokens picked from a row: the K, and the label.
p = teacher, q = student, both at temperature 1. The rest is every token that is not an entry of the top k; the tail is
its category. The categories' logits are the student's logits at the K ids, and the log-sum-exp of the rest's. The
divergence over categories is the dense one of these logits, and the gradient of the tail's logit spreads over the rest
in proportion to q. On a GPU the passes over the vocabulary are kernels, in `triton_topk.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence.dense import compare_logits
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.rows import (
    Fused,
    LogitsComparison,
    RowComparison,
    is_compiled,
    mask_cross_entropy,
    runs_in_triton,
    tile_size,
    tiles,
)
from gkd_trainer.signals import TopKSignal

_EXCESS_MASS = 1e-3
"""How far rounding may raise the mass of a teacher's top k above one; more is not a distribution."""

_SMALLEST_TILE = 64
"""Minimum number of tokens that share the small operations on categories, which cost more than a few tokens' logits."""

_TILES = 3
"""How many of `LogitsComparison`'s tiles are processed at once: there are a third as many temporaries."""

_FAR = -1e4
"""Stands for the logarithm of zero when multiplied by zero."""


def topk_divergence(
    student_logits_NV: Tensor,
    teacher: TopKSignal,
    *,
    objective: Objective,
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    token_block: int | None = None,
) -> TokenDivergence:
    """Compare a student's logits [N, V] with a teacher's top tokens, token by token.

    The arguments are those of `loss.token_divergence`, which checks them; `token_block` tokens are compared at once.
    The only tensor of N×V elements allocated is the gradient of the student's logits, in their dtype.
    """
    return compare_logits(
        TopKComparison(objective, tail),
        student_logits_NV,
        (teacher.ids_NK, teacher.log_p_NK),
        labels_N=labels_N,
        largest=token_block or max(_SMALLEST_TILE, tile_size(student_logits_NV)),
    )


@dataclass(frozen=True)
class TopKComparison(RowComparison):
    """Compares with a teacher's top tokens, ids and log-probs [R, K]; see `LogitsComparison` for the other fields.

    The categories are computed in the larger dtype of the two sides. With `half`, which needs `has_topk_kernels`, the
    gradient has this dtype (see `rows.gradient_of`).
    """

    objective: Objective
    tail: str = "bucket"
    softcap: float | None = None
    temporary: int | None = None
    half: torch.dtype | None = None

    def __call__(
        self,
        student_RV: Tensor,
        teacher: tuple[Tensor, ...],
        labels_R: Tensor | None = None,
        *,
        value_weight_R: Tensor | None = None,
        label_weight_R: Tensor | None = None,
    ) -> TokenDivergence:
        """Compare; see `RowComparison`."""
        ids_RK, log_p_RK = teacher
        compare = self._by_kernels if has_topk_kernels(student_RV, ids_RK, log_p_RK) else self._in_plain_torch
        return compare(student_RV, ids_RK, log_p_RK, labels_R, value_weight_R, label_weight_R)

    def _by_kernels(
        self,
        student_RV: Tensor,
        ids_RK: Tensor,
        log_p_RK: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
    ) -> TokenDivergence:
        from gkd_trainer.divergence import triton_topk

        has_bucket = self.tail == "bucket"
        rows = triton_topk.categories(
            student_RV, ids_RK, log_p_RK, labels_R, has_bucket=has_bucket, max_mass=1 + _EXCESS_MASS
        )
        slope_RC = rows.student_RC
        result = LogitsComparison(self.objective, temporary=self.temporary)(
            slope_RC, (rows.teacher_RC,), value_weight_R=value_weight_R
        )
        if value_weight_R is not None:
            triton_topk.write_gradient(
                student_RV, slope_RC, rows, labels_R, label_weight_R, softcap=self.softcap, half=self.half
            )
        return replace(
            result,
            cross_entropy_N=rows.cross_entropy_R,
            student_entropy_N=rows.student_entropy_R,
            agrees_N=rows.agrees_R,
            is_teacher_finite_N=rows.is_teacher_finite_R,
            teacher_mass_N=rows.teacher_mass_R,
            student_mass_N=rows.student_mass_R,
        )

    def _in_plain_torch(
        self,
        student_RV: Tensor,
        ids_RK: Tensor,
        log_p_RK: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
    ) -> TokenDivergence:
        K, V = ids_RK.shape[1], student_RV.shape[1]
        dtype = torch.promote_types(student_RV.dtype, log_p_RK.dtype)
        entries = _Entries.of(ids_RK, log_p_RK, V)
        picked = _Picked.of(student_RV, entries, labels_R)
        rest = self._measured_rest(student_RV, picked, is_overwritten=value_weight_R is not None)
        student = _student_categories(
            picked.logits_RJ[:, :K].masked_fill(~entries.is_inside_RK, -math.inf), rest, dtype
        )
        if self.tail == "bucket":
            log_tail_p_R = _log_tail(log_p_RK, entries.is_entry_RK, V, is_rest_empty_R=rest.total_R1[:, 0] == 0)
            slope_RC, teacher_RC = student.logits_RC, torch.cat([log_p_RK, log_tail_p_R[:, None]], dim=1)
        else:
            # Nothing is known without entries: both sides have one category, the same.
            is_empty_R1 = ~entries.is_entry_RK.any(dim=1, keepdim=True)
            is_only_RK = torch.nn.functional.pad(is_empty_R1, (0, K - 1), value=False)
            slope_RC = student.logits_RC[:, :K].masked_fill(is_only_RK, 0.0)
            teacher_RC = log_p_RK.masked_fill(is_only_RK, 0.0)
        # The value must show errors that the categories hide: bad logits outside them, a mass above one.
        slope_RC = slope_RC.masked_fill(~student.is_finite_R[:, None], math.nan)
        teacher_RC = teacher_RC.to(dtype).masked_fill(~entries.is_finite_R[:, None], math.nan)
        result = LogitsComparison(self.objective, temporary=self.temporary)(
            slope_RC, (teacher_RC,), value_weight_R=None if value_weight_R is None else value_weight_R.to(dtype)
        )

        cross_entropy_R = None
        if labels_R is not None:
            label_logits_R1 = picked.logits_RJ[:, K:] - student.shift_R1
            cross_entropy_R = mask_cross_entropy((student.log_z_R1 - label_logits_R1)[:, 0], labels_R, V)
        if value_weight_R is not None:
            slope_RC, slope_RJ = _with_label(slope_RC, student.q_RC, labels_R, cross_entropy_R, label_weight_R)
            self._write_gradient(student_RV, picked, rest, slope_RC[:, K:], slope_RJ, student.is_finite_R[:, None])

        is_top_shared_RK = (student.entries_RK == student.top_R1) & (log_p_RK == log_p_RK.amax(dim=1, keepdim=True))
        return replace(
            result,
            cross_entropy_N=cross_entropy_R,
            student_entropy_N=student.entropy_R(rest),
            agrees_N=is_top_shared_RK.any(dim=1) & entries.is_finite_R & student.is_finite_R,
            is_teacher_finite_N=entries.is_finite_R,
            teacher_mass_N=entries.mass_R.to(dtype),
            student_mass_N=student.q_RC[:, :K].sum(dim=1),
        )

    def _measured_rest(self, student_RV: Tensor, picked: _Picked, *, is_overwritten: bool) -> _Rest:
        """Measure the logits outside the top k; if `is_overwritten`, those inside become -inf in place."""
        # Added, not assigned: an id that is not an entry may equal that of an entry, and must not change it.
        hole_RJ = torch.where(picked.is_inside_RJ, -math.inf, 0.0).to(student_RV.dtype)
        rest = _Rest(*student_RV.new_empty(3, len(student_RV), 1).unbind())
        for tile in self._tiles(student_RV):
            # As plain tensors: the compiler checks the size of a view's base, which changes.
            logits_RV = student_RV[tile].data
            add = logits_RV.scatter_add_ if is_overwritten else logits_RV.scatter_add
            logits_RV = add(1, picked.ids_RJ[tile], hole_RJ[tile])
            measure: Callable[[Tensor], _Rest] = _fused_measure if is_compiled(logits_RV) else _measure
            # Copied, as in `LogitsComparison`.
            for field_R1, of_tile_R1 in zip(rest, measure(logits_RV), strict=True):
                field_R1[tile] = of_tile_R1
        return rest

    def _write_gradient(
        self,
        student_RV: Tensor,
        picked: _Picked,
        rest: _Rest,
        rest_slope_R1: Tensor,
        slope_RJ: Tensor,
        is_finite_R1: Tensor,
    ) -> None:
        """Overwrite logits by the gradient: the rest by its slope in proportion to q, the picked tokens by theirs."""
        if self.softcap is not None:
            slope_RJ = slope_RJ * (1 - (picked.logits_RJ / self.softcap) ** 2)
        weight_R1 = torch.where(rest.total_R1 == 0, 0.0, rest_slope_R1 / rest.total_R1).to(student_RV.dtype)
        shift_R1 = _shift(rest.top_R1)
        per_softcap = None if self.softcap is None else student_RV.new_full((), 1 / self.softcap)
        for tile in self._tiles(student_RV):
            logits_RV = student_RV[tile].data
            write: _Write = _fused_write if is_compiled(logits_RV) else _write
            write(logits_RV, shift_R1[tile].data, weight_R1[tile].data, is_finite_R1[tile].data, per_softcap)
        slope_RJ = torch.where(is_finite_R1, slope_RJ, 0.0)
        student_RV.scatter_add_(1, picked.ids_RJ, slope_RJ.to(student_RV.dtype))

    def _tiles(self, student_RV: Tensor) -> Iterator[slice]:
        largest = tile_size(student_RV)
        if self.temporary is not None:
            largest = min(largest, self.temporary // student_RV.shape[1])
        return tiles(len(student_RV), max(1, _TILES * largest))


def has_topk_kernels(student_RV: Tensor, ids_RK: Tensor, log_p_RK: Tensor) -> bool:
    """Return whether kernels do the passes over the vocabulary; they do any divergence, but only in float32."""
    if not runs_in_triton(student_RV) or log_p_RK.dtype != torch.float32:
        return False
    from gkd_trainer.divergence import triton_topk

    return ids_RK.shape[1] <= triton_topk.MAX_TOP_K


class _Entries(NamedTuple):
    """A teacher's top tokens: which of the K are entries, which entries are tokens, their mass, and their validity.

    `ids_RK` are within the vocabulary, also for missing entries.
    """

    ids_RK: Tensor
    is_entry_RK: Tensor
    is_inside_RK: Tensor
    mass_R: Tensor
    is_finite_R: Tensor

    @classmethod
    def of(cls, ids_RK: Tensor, log_p_RK: Tensor, V: int) -> _Entries:
        is_entry_RK = log_p_RK != -math.inf
        is_token_RK = (ids_RK >= 0) & (ids_RK < V)
        mass_R = log_p_RK.logsumexp(dim=1).exp()
        is_finite_R = ~(is_entry_RK & ~is_token_RK).any(dim=1)
        is_finite_R &= mass_R <= 1 + _EXCESS_MASS  # False for NaN too
        return cls(ids_RK.clamp(0, V - 1), is_entry_RK, is_entry_RK & is_token_RK, mass_R, is_finite_R)


class _Picked(NamedTuple):
    """The tokens picked from each row, the K and the label: their ids, whether they are in the top k, their logits."""

    ids_RJ: Tensor
    is_inside_RJ: Tensor
    logits_RJ: Tensor

    @classmethod
    def of(cls, student_RV: Tensor, entries: _Entries, labels_R: Tensor | None) -> _Picked:
        ids_RJ, is_inside_RJ = entries.ids_RK, entries.is_inside_RK
        if labels_R is not None:
            is_inside_RJ = torch.nn.functional.pad(is_inside_RJ, (0, 1), value=False)
            ids_RJ = torch.cat([ids_RJ, labels_R.clamp(0, student_RV.shape[1] - 1)[:, None]], dim=1)
        return cls(ids_RJ, is_inside_RJ, student_RV.gather(1, ids_RJ))


class _StudentCategories(NamedTuple):
    """The student over the categories: logits minus `shift_R1`, normalised by `log_z_R1`, and q with its logarithm.

    `entries_RK` are the logits of the entries, -inf if missing, and `top_R1` is the largest logit of all.
    """

    entries_RK: Tensor
    top_R1: Tensor
    shift_R1: Tensor
    logits_RC: Tensor
    log_z_R1: Tensor
    log_q_RC: Tensor
    q_RC: Tensor
    is_finite_R: Tensor

    def entropy_R(self, rest: _Rest) -> Tensor:
        """The entropy over all tokens: over the categories, and within the rest."""
        # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
        return -(self.q_RC * self.log_q_RC.clamp(min=_FAR)).sum(dim=1) + self.q_RC[:, -1] * rest.entropy_R


def _student_categories(entries_RK: Tensor, rest: _Rest, dtype: torch.dtype) -> _StudentCategories:
    top_R1 = torch.maximum(entries_RK.amax(dim=1, keepdim=True), rest.top_R1)
    # Subtract the largest logit, which cancels: the teacher's log-probs are then compared with numbers of similar size,
    # not with logits, which round much more coarsely.
    shift_R1 = _shift(top_R1).to(dtype)
    log_rest_R1 = rest.total_R1.to(dtype).log() + (_shift(rest.top_R1) - shift_R1)
    logits_RC = torch.cat([entries_RK - shift_R1, log_rest_R1], dim=1)
    log_z_R1 = logits_RC.logsumexp(dim=1, keepdim=True)
    log_q_RC = logits_RC - log_z_R1
    is_finite_R = log_z_R1[:, 0].isfinite()
    return _StudentCategories(entries_RK, top_R1, shift_R1, logits_RC, log_z_R1, log_q_RC, log_q_RC.exp(), is_finite_R)


def _with_label(
    slope_RC: Tensor,
    q_RC: Tensor,
    labels_R: Tensor | None,
    cross_entropy_R: Tensor | None,
    label_weight_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the slopes of all categories and of the picked tokens, with the weighted cross entropy's slopes added."""
    slope_RC = torch.nn.functional.pad(slope_RC, (0, q_RC.shape[1] - slope_RC.shape[1]))
    if labels_R is None or cross_entropy_R is None:
        return slope_RC, slope_RC[:, :-1]
    is_trained_R = cross_entropy_R.isfinite() & (labels_R != IGNORE_INDEX)
    weight_R = is_trained_R.to(slope_RC.dtype) * (0.0 if label_weight_R is None else label_weight_R)
    slope_RC = slope_RC + torch.where(is_trained_R[:, None], q_RC * weight_R[:, None], 0.0)
    return slope_RC, torch.cat([slope_RC[:, :-1], -weight_R[:, None]], dim=1)


class _Rest(NamedTuple):
    """The logits outside the top k: the largest, top, and sums of the exponentials e = exp(logit - top).

    `total` is Σ e, `mean` is Σ e·(logit - top) / Σ e. Without logits, or with only -inf, these are -inf, 0 and NaN.
    """

    top_R1: Tensor
    total_R1: Tensor
    mean_R1: Tensor

    @property
    def entropy_R(self) -> Tensor:
        """The entropy within the rest; zero if there is no rest."""
        entropy_R1 = self.total_R1.log() - self.mean_R1
        return torch.where(self.total_R1 == 0, 0.0, entropy_R1)[:, 0]


def _measure(logits_RV: Tensor) -> _Rest:
    top_R1 = logits_RV.amax(dim=1, keepdim=True)
    below_RV = logits_RV - _shift(top_R1)
    e_RV = below_RV.exp()
    total_R1 = e_RV.sum(dim=1, keepdim=True)
    return _Rest(top_R1, total_R1, (e_RV * below_RV.clamp(min=_FAR)).sum(dim=1, keepdim=True) / total_R1)


class _Write(Protocol):
    """The type of `_write`."""

    def __call__(
        self,
        logits_RV: Tensor,
        shift_R1: Tensor,
        weight_R1: Tensor,
        is_finite_R1: Tensor,
        per_softcap: Tensor | None,
        /,
    ) -> None: ...


def _write(
    logits_RV: Tensor, shift_R1: Tensor, weight_R1: Tensor, is_finite_R1: Tensor, per_softcap: Tensor | None
) -> None:
    """Overwrite logits by the gradient weight·exp(logits - shift) of the logits before the soft-cap."""
    gradient_RV = (logits_RV - shift_R1).exp() * weight_R1
    if per_softcap is not None:
        gradient_RV = gradient_RV * (1 - (logits_RV * per_softcap).clamp(min=-1) ** 2)
    logits_RV.copy_(torch.where(is_finite_R1, gradient_RV, 0.0))


_fused_measure, _fused_write = Fused(_measure), Fused(_write)


def _shift(top_R1: Tensor) -> Tensor:
    # Where all are -inf, shift by nothing: -inf - -inf would be NaN.
    return torch.where(top_R1 == -math.inf, 0.0, top_R1)


def _log_tail(log_p_RK: Tensor, is_entry_RK: Tensor, V: int, *, is_rest_empty_R: Tensor) -> Tensor:
    """Return the log of the teacher's mass outside its entries; -inf if no token is outside."""
    # 1 - mass rounds to zero for a small tail, which would make the reverse KL infinite.
    resolution = torch.finfo(log_p_RK.dtype).eps
    tail_p_R = -torch.expm1(log_p_RK.logsumexp(dim=1))
    log_tail_p_R = tail_p_R.clamp_min(resolution).log()
    # If a signal was sliced to only the entries' tokens, no token is left for the other mass: entries are renormalised.
    has_no_outside_R = is_entry_RK.sum(dim=1) == V
    is_empty_R = is_rest_empty_R & (tail_p_R <= resolution)
    return log_tail_p_R.masked_fill(has_no_outside_R | is_empty_R, -math.inf)

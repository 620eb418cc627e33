"""The divergence from a teacher's top tokens, with one category for all the others.

Shapes: N tokens, R rows (tokens) compared at once, V vocabulary, K top tokens of the teacher, C = K + 1 categories,
J the tokens picked from a row: the K, and the label.
p = teacher, q = student, both at temperature 1; the rest, or tail, is every token that is not an entry of the top k.
The categories' logits are the student's at the K ids and, for the rest, the log-sum-exp of theirs: the divergence
over categories is the dense one of these, and its gradient of the tail's logit spreads over the tail's tokens in
proportion to q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gkd_trainer.divergence.dense import compare_logits
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.rows import (
    RowComparison,
    RowStatistics,
    fused,
    is_compiled,
    mask_cross_entropy,
    tile_rows,
    tiles,
)
from gkd_trainer.types import IGNORE_INDEX, TopKSignal

_EXCESS_MASS = 1e-3
"""How far above one the mass of a teacher's top k may be by rounding; more is no distribution."""

_ROWS = 64
"""How many rows at least share the small operations on categories, which take longer than the logits of a few."""

_TILES = 3
"""How many of `RowComparison`'s tiles are worked on at once: there are a third as many temporaries."""

_FAR = -1e4
"""What stands for the logarithm of zero where it is multiplied by zero."""


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

    The arguments are those of `loss.token_divergence`, which checks them; `token_block` tokens are worked on at
    once. No tensor of N×V elements is made but the gradient of the student's logits, in their dtype.
    """
    return compare_logits(
        TopKRowComparison(objective, tail),
        student_logits_NV,
        (teacher.ids_NK, teacher.log_p_NK),
        labels_N=labels_N,
        tile=token_block or max(_ROWS, tile_rows(student_logits_NV)),
    )


@dataclass(frozen=True)
class TopKRowComparison:
    """How rows of logits are compared with top tokens; the other fields are those of `RowComparison`."""

    objective: Objective
    tail: str = "bucket"
    softcap: float | None = None
    temporary: int | None = None

    def __call__(
        self,
        student_RV: Tensor,
        ids_RK: Tensor,
        log_p_RK: Tensor,
        labels_R: Tensor | None = None,
        *,
        value_weight_R: Tensor | None = None,
        label_weight_R: Tensor | None = None,
    ) -> RowStatistics:
        """Compare rows of logits, float32 or float64, with top tokens, and turn them into a gradient.

        What is written into `student_RV`, and when, is as in `RowComparison`. What is computed of the categories
        is so in the larger dtype of both sides.
        """
        K, V = ids_RK.shape[1], student_RV.shape[1]
        is_entry_RK = log_p_RK != -math.inf
        is_token_RK = (ids_RK >= 0) & (ids_RK < V)
        is_inside_RJ, picked_RJ = is_entry_RK & is_token_RK, ids_RK.clamp(0, V - 1)
        if labels_R is not None:
            is_inside_RJ = torch.nn.functional.pad(is_inside_RJ, (0, 1), value=False)
            picked_RJ = torch.cat([picked_RJ, labels_R.clamp(0, V - 1)[:, None]], dim=1)
        logits_RJ = student_RV.gather(1, picked_RJ)
        rest = self._rest(student_RV, picked_RJ, is_inside_RJ, is_overwritten=value_weight_R is not None)

        dtype = torch.promote_types(student_RV.dtype, log_p_RK.dtype)
        entries_RK = logits_RJ[:, :K].masked_fill(~is_inside_RJ[:, :K], -math.inf)
        top_R1 = torch.maximum(entries_RK.amax(dim=1, keepdim=True), rest.top_R1)
        # All less the largest logit, which drops out: log-probs of a teacher are compared with numbers of their own
        # size, and not of logits that round much more coarsely.
        shift_R1 = _shift(top_R1).to(dtype)
        log_rest_R1 = rest.total_R1.to(dtype).log() + (_shift(rest.top_R1) - shift_R1)
        student_RC = torch.cat([entries_RK - shift_R1, log_rest_R1], dim=1)
        log_z_R1 = student_RC.logsumexp(dim=1, keepdim=True)
        log_q_RC = student_RC - log_z_R1
        q_RC = log_q_RC.exp()
        is_student_finite_R = log_z_R1[:, 0].isfinite()

        mass_p_R = log_p_RK.logsumexp(dim=1).exp()
        is_teacher_finite_R = is_entry_RK.any(dim=1) & ~(is_entry_RK & ~is_token_RK).any(dim=1)
        is_teacher_finite_R &= mass_p_R <= 1 + _EXCESS_MASS  # False for NaN too
        teacher_RC = log_p_RK
        if self.tail == "bucket":
            log_tail_p_R = _log_tail(log_p_RK, is_entry_RK, V, is_rest_empty_R=rest.total_R1[:, 0] == 0)
            teacher_RC = torch.cat([log_p_RK, log_tail_p_R[:, None]], dim=1)
        # What the categories don't show must show in the value: logits outside them, a mass above one.
        slope_RC = student_RC[:, : teacher_RC.shape[1]].masked_fill(~is_student_finite_R[:, None], math.nan)
        teacher_RC = teacher_RC.to(dtype).masked_fill(~is_teacher_finite_R[:, None], math.nan)
        result = RowComparison(self.objective, temporary=self.temporary)(
            slope_RC, teacher_RC, value_weight_R=None if value_weight_R is None else value_weight_R.to(dtype)
        )

        cross_entropy_R = None
        if labels_R is not None:
            label_logits_R1 = logits_RJ[:, K:] - shift_R1
            cross_entropy_R = mask_cross_entropy((log_z_R1 - label_logits_R1)[:, 0], labels_R, V)
        if value_weight_R is not None:
            slope_RC = torch.nn.functional.pad(slope_RC, (0, q_RC.shape[1] - slope_RC.shape[1]))
            slope_RJ = slope_RC[:, :K]
            if labels_R is not None and cross_entropy_R is not None:
                is_trained_R = cross_entropy_R.isfinite() & (labels_R != IGNORE_INDEX)
                weight_R = is_trained_R.to(dtype) * (0.0 if label_weight_R is None else label_weight_R)
                slope_RC = slope_RC + torch.where(is_trained_R[:, None], q_RC * weight_R[:, None], 0.0)
                slope_RJ = torch.cat([slope_RC[:, :K], -weight_R[:, None]], dim=1)
            if self.softcap is not None:
                slope_RJ = slope_RJ * (1 - (logits_RJ / self.softcap) ** 2)
            self._spread(student_RV, rest, slope_RC[:, K:], is_student_finite_R[:, None])
            slope_RJ = torch.where(is_student_finite_R[:, None], slope_RJ, 0.0)
            student_RV.scatter_add_(1, picked_RJ, slope_RJ.to(student_RV.dtype))

        # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
        entropy_q_R = -(q_RC * log_q_RC.clamp(min=_FAR)).sum(dim=1) + q_RC[:, K] * rest.entropy_R
        is_top_shared_RK = (entries_RK == top_R1) & (log_p_RK == log_p_RK.amax(dim=1, keepdim=True))
        return RowStatistics(
            values_R=result.values_R,
            cross_entropy_R=cross_entropy_R,
            student_entropy_R=entropy_q_R,
            teacher_entropy_R=result.teacher_entropy_R,
            agrees_R=is_top_shared_RK.any(dim=1) & is_teacher_finite_R & is_student_finite_R,
            is_teacher_finite_R=is_teacher_finite_R,
            is_finite_R=result.is_finite_R,
            teacher_mass_R=mass_p_R.to(dtype),
            student_mass_R=q_RC[:, :K].sum(dim=1),
        )

    def _rest(self, student_RV: Tensor, picked_RJ: Tensor, is_inside_RJ: Tensor, *, is_overwritten: bool) -> _Rest:
        """Measure the logits without those inside the top k, which become -inf in place if that is wanted."""
        # Added and not assigned: an id of no entry may be that of another entry too, and must leave it alone.
        hole_RJ = torch.where(is_inside_RJ, -math.inf, 0.0).to(student_RV.dtype)
        rest = _Rest(*student_RV.new_empty(3, len(student_RV), 1).unbind())
        for rows in self._tiles(student_RV):
            # As plain tensors: of views, the compiler looks at what they are of, whose size changes.
            logits_RV = student_RV[rows].data
            add = logits_RV.scatter_add_ if is_overwritten else logits_RV.scatter_add
            logits_RV = add(1, picked_RJ[rows], hole_RJ[rows])
            measure = fused(_measure) if is_compiled(logits_RV) else _measure
            # Copied, as in `RowComparison`.
            for whole_R1, part_R1 in zip(rest, measure(logits_RV), strict=True):
                whole_R1[rows] = part_R1
        return rest

    def _spread(self, student_RV: Tensor, rest: _Rest, slope_R1: Tensor, is_finite_R1: Tensor) -> None:
        """Overwrite the rest's logits by its slope in proportion to q, and what is not of it by zero."""
        weight_R1 = torch.where(rest.total_R1 == 0, 0.0, slope_R1 / rest.total_R1).to(student_RV.dtype)
        shift_R1 = _shift(rest.top_R1)
        per_softcap = None if self.softcap is None else student_RV.new_full((), 1 / self.softcap)
        for rows in self._tiles(student_RV):
            inputs = [tensor[rows].data for tensor in (student_RV, shift_R1, weight_R1, is_finite_R1)]
            write = fused(_write) if is_compiled(inputs[0]) else _write
            write(*inputs, per_softcap=per_softcap)

    def _tiles(self, student_RV: Tensor) -> Iterator[slice]:
        largest = tile_rows(student_RV)
        if self.temporary is not None:
            largest = min(largest, self.temporary // student_RV.shape[1])
        return tiles(len(student_RV), max(1, _TILES * largest))


class _Rest(NamedTuple):
    """The logits outside the top k: the largest, and sums of their exponentials e after it is subtracted from all.

    `total` is Σ e, `mean` is Σ e·(logit - top) / Σ e. Of none, or -inf alone, they are -inf, 0 and NaN.
    """

    top_R1: Tensor
    total_R1: Tensor
    mean_R1: Tensor

    @property
    def entropy_R(self) -> Tensor:
        """The entropy of the rest as a distribution of its own; zero where there is none."""
        entropy_R1 = self.total_R1.log() - self.mean_R1
        return torch.where(self.total_R1 == 0, 0.0, entropy_R1)[:, 0]


def _measure(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `_Rest`."""
    top_R1 = logits_RV.amax(dim=1, keepdim=True)
    below_RV = logits_RV - _shift(top_R1)
    e_RV = below_RV.exp()
    total_R1 = e_RV.sum(dim=1, keepdim=True)
    return top_R1, total_R1, (e_RV * below_RV.clamp(min=_FAR)).sum(dim=1, keepdim=True) / total_R1


def _write(
    logits_RV: Tensor, shift_R1: Tensor, weight_R1: Tensor, is_finite_R1: Tensor, *, per_softcap: Tensor | None
) -> None:
    """Overwrite logits by the gradient weight·exp(logits - shift), with respect to those before the soft-cap."""
    gradient_RV = (logits_RV - shift_R1).exp() * weight_R1
    if per_softcap is not None:
        gradient_RV = gradient_RV * (1 - (logits_RV * per_softcap).clamp(min=-1) ** 2)
    logits_RV.copy_(torch.where(is_finite_R1, gradient_RV, 0.0))


def _shift(top_R1: Tensor) -> Tensor:
    # Where all is -inf there is nothing to shift by: -inf - -inf would be NaN.
    return torch.where(top_R1 == -math.inf, 0.0, top_R1)


def _log_tail(log_p_RK: Tensor, is_entry_RK: Tensor, V: int, *, is_rest_empty_R: Tensor) -> Tensor:
    """Return log of the teacher's mass outside its entries; -inf where there is no token outside."""
    # 1 - mass rounds to zero where the tail is small, and zero would make the reverse KL infinite.
    resolution = torch.finfo(log_p_RK.dtype).eps
    tail_p_R = -torch.expm1(log_p_RK.logsumexp(dim=1))
    log_tail_p_R = tail_p_R.clamp_min(resolution).log()
    # Of a signal sliced to the entries' tokens, the mass elsewhere is nowhere: the entries are renormalised.
    has_no_outside_R = is_entry_RK.sum(dim=1) == V
    is_empty_R = is_rest_empty_R & (tail_p_R <= resolution)
    return log_tail_p_R.masked_fill(has_no_outside_R | is_empty_R, -math.inf)

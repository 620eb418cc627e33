"""The losses over sorted probabilities: Universal Logit Distillation, and GOLD's mix of it with a divergence.

Shapes: R rows of logits (tokens compared at once), V the student's vocabulary, W the teacher's, M tokens that both
have, U the tokens of a side that are sorted. p = teacher, q = student, both softmax(logits / temperature).

"uld": Σ abs(p₍ᵢ₎ − q₍ᵢ₎) over all tokens, each side's sorted from its most probable one and padded with zeros (Boizard
et al. 2024, arXiv 2402.12030). It does not depend on which token is which: a student whose top token is wrong but as
probable as the teacher's has a loss of zero.
"gold": M/W · the divergence's terms over the tokens that both have + (1 − M/W) · the above over all others, as TRL's
GOLDTrainer computes it by default (Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"); tokens
match by their bytes, where TRL's match by their strings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_trainer.divergence.objective import TERMS, Objective, Pair
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.signals import VocabularyMap


@dataclass(frozen=True)
class SortedTerms:
    """Compares sorted probabilities, in the map's mode."""

    objective: Objective
    mapping: VocabularyMap

    def __call__(
        self, student_RV: Tensor, teacher_RW: Tensor, value_weight_R: Tensor | None
    ) -> tuple[TokenDivergence, Tensor | None]:
        """Compare; see `mapped.Terms`."""
        mapping = self.mapping
        log_q_RV, log_p_RW = student_RV.log_softmax(dim=1), teacher_RW.log_softmax(dim=1)
        q_RV, p_RW = log_q_RV.exp(), log_p_RW.exp()
        values_R, slope_RV = self._terms(log_q_RV, log_p_RW, q_RV, p_RW)
        is_finite_R = values_R.isfinite()
        teacher_of_V = torch.full_like(mapping.student_group_V, -1)
        teacher_of_V[mapping.student_ids_M] = mapping.teacher_ids_M
        result = TokenDivergence(
            values_N=values_R,
            cross_entropy_N=None,
            student_entropy_N=-_products(q_RV, log_q_RV),
            teacher_entropy_N=-_products(p_RW, log_p_RW),
            agrees_N=(teacher_of_V[q_RV.argmax(dim=1)] == p_RW.argmax(dim=1)) & is_finite_R,
            is_teacher_finite_N=p_RW.sum(dim=1).isfinite(),
            is_finite_N=is_finite_R,
            teacher_matched_mass_N=p_RW[:, mapping.teacher_ids_M].sum(dim=1),
            student_matched_mass_N=q_RV[:, mapping.student_ids_M].sum(dim=1),
            is_grouped_N=torch.zeros_like(is_finite_R),
        )
        if value_weight_R is None:
            return result, None
        return result, (slope_RV - q_RV * slope_RV.sum(dim=1, keepdim=True)) * value_weight_R[:, None]

    def _terms(self, log_q_RV: Tensor, log_p_RW: Tensor, q_RV: Tensor, p_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values, and the slopes q·∂value/∂q of the student's tokens."""
        mapping, slope_RV = self.mapping, torch.zeros_like(q_RV)
        if self.mapping.mode == "uld":
            return _sorted_distance(q_RV, p_RW, slope_RV, torch.arange(q_RV.shape[1], device=q_RV.device)), slope_RV
        share = len(mapping.teacher_ids_M) / p_RW.shape[1]
        rest = mapping.student_rest
        distance_R = q_RV.new_zeros(len(q_RV))
        if len(rest):  # otherwise TRL counts nothing: the student can't follow the teacher to tokens that it lacks
            distance_R = _sorted_distance(q_RV[:, rest], p_RW[:, mapping.teacher_rest], slope_RV, rest)
        matched_R, matched_RM = self._matched_terms(
            *(log_RV[:, ids] for log_RV, ids in ((log_q_RV, mapping.student_ids_M), (log_p_RW, mapping.teacher_ids_M)))
        )
        slope_RV *= 1 - share
        slope_RV[:, mapping.student_ids_M] = share * matched_RM
        return share * matched_R + (1 - share) * distance_R, slope_RV

    def _matched_terms(self, log_q_RM: Tensor, log_p_RM: Tensor) -> tuple[Tensor, Tensor]:
        _, _, factor, first, second = self.objective.numbers(None)
        q_RM, p_RM = log_q_RM.exp(), log_p_RM.exp()
        gap_RM = torch.where(q_RM + p_RM == 0, 0.0, log_q_RM - log_p_RM)
        pair = Pair(q_RM, p_RM, log_q_RM, log_p_RM, gap_RM)
        values_RM, slope_RM = TERMS[self.objective.kind](pair, q_RM.new_full((), first), q_RM.new_full((), second))
        # The slopes leave out multiples of q, which cancel only in a sum over all tokens.
        slope_RM = slope_RM + {"forward_kl": -q_RM, "reverse_kl": q_RM}.get(self.objective.kind, 0.0)
        return values_RM.sum(dim=1) * factor, slope_RM * factor


def _sorted_distance(q_RU: Tensor, p_RU: Tensor, slope_RV: Tensor, ids_U: Tensor) -> Tensor:
    """Return Σ abs(p₍ᵢ₎ − q₍ᵢ₎) of each row, and write the slopes q·∂/∂q into the columns `ids_U` of `slope_RV`."""
    longest = max(q_RU.shape[1], p_RU.shape[1])
    sorted_q_RU, places_RU = q_RU.sort(dim=1, descending=True)
    sorted_p_RU = p_RU.sort(dim=1, descending=True).values
    pad = torch.nn.functional.pad
    gap_RU = pad(sorted_q_RU, (0, longest - q_RU.shape[1])) - pad(sorted_p_RU, (0, longest - p_RU.shape[1]))
    slope_RU = torch.empty_like(q_RU).scatter_(1, places_RU, sorted_q_RU * gap_RU[:, : q_RU.shape[1]].sign())
    slope_RV[:, ids_U] = slope_RU
    return gap_RU.abs().sum(dim=1)


def _products(p_RV: Tensor, log_p_RV: Tensor) -> Tensor:
    # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
    return (p_RV * log_p_RV.clamp(min=-1e4)).sum(dim=1)

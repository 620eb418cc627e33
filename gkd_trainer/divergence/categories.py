"""Both distributions over categories that two vocabularies have in common.

Shapes: R rows of logits (tokens compared at once), V the student's vocabulary, W the teacher's, M tokens that both
have, C categories. p = teacher, q = student.
A category's probability is the sum of its tokens', so its logit is their log-sum-exp, and the divergence over
categories is the ordinary one of these logits. The gradient of a category's logit spreads over its tokens in proportion
to q.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.rows import LogitsComparison
from gkd_trainer.signals import VocabularyMap


@dataclass(frozen=True)
class CategoryTerms:
    """Compares over categories, which the map's mode chooses.

    "matched": over the tokens that both have, with one category for each side's others; at a position where the teacher
    gives the tokens that both have a probability below `min_matched_mass`, over the groups instead. "next_byte": over
    the groups everywhere.
    """

    objective: Objective
    mapping: VocabularyMap

    def __call__(
        self, student_RV: Tensor, teacher_RW: Tensor, value_weight_R: Tensor | None
    ) -> tuple[TokenDivergence, Tensor | None]:
        """Compare; see `mapped.Terms`."""
        mapping = self.mapping
        matched = _MatchedTokens(mapping, student_RV, teacher_RW)
        if mapping.mode == "next_byte":
            is_grouped_R = torch.ones_like(matched.teacher_mass_R, dtype=torch.bool)
        else:
            is_grouped_R = matched.teacher_mass_R < mapping.min_matched_mass
        # Looking is free on the CPU, and would wait for any other device.
        is_cpu = student_RV.device.type == "cpu"
        first, second = [], []
        if not is_cpu or not bool(is_grouped_R.all()) or len(is_grouped_R) == 0:
            first = [self._over(matched, value_weight_R, ~is_grouped_R)]
        if not is_cpu or bool(is_grouped_R.any()):
            second = [self._over(_Groups(mapping, student_RV, teacher_RW), value_weight_R, is_grouped_R)]
        result, gradient_RV = (first + second)[0]
        if first and second:
            grouped, grouped_RV = second[0]
            result = _chosen(is_grouped_R, grouped, result)
            if gradient_RV is not None and grouped_RV is not None:
                gradient_RV = torch.where(is_grouped_R[:, None], grouped_RV, gradient_RV)
        return replace(
            result,
            teacher_matched_mass_N=matched.teacher_mass_R,
            student_matched_mass_N=matched.student_mass_R,
            is_grouped_N=is_grouped_R,
        ), gradient_RV

    def _over(
        self, categories: _Categories, value_weight_R: Tensor | None, is_used_R: Tensor
    ) -> tuple[TokenDivergence, Tensor | None]:
        compare = LogitsComparison(replace(self.objective, temperature=1.0))
        weight_R = None if value_weight_R is None else torch.where(is_used_R, value_weight_R, 0.0)
        slope_RC = categories.student_RC if weight_R is None else categories.student_RC.clone()
        result = compare(slope_RC, (categories.teacher_RC,), value_weight_R=weight_R)
        result = replace(result, agrees_N=result.agrees_N & categories.has_token_on_top_R)
        return result, None if weight_R is None else categories.spread(slope_RC)


def _chosen(is_first_R: Tensor, first: TokenDivergence, second: TokenDivergence) -> TokenDivergence:
    """Return the fields of one result or the other, by row."""
    fields: dict[str, Any] = {
        name: None if of_second_R is None else torch.where(is_first_R, getattr(first, name), of_second_R)
        for name, of_second_R in vars(second).items()
    }
    return TokenDivergence(**fields)


class _Categories(ABC):
    """Categories of both vocabularies, as logits of student and teacher [R, C].

    `has_token_on_top_R` says whether the student's top category is known to be the same for both.
    """

    student_RC: Tensor
    teacher_RC: Tensor
    has_token_on_top_R: Tensor

    @abstractmethod
    def spread(self, gradient_RC: Tensor) -> Tensor:
        """Return the gradient [R, V] of the student's logits, given that of its categories."""


class _MatchedTokens(_Categories):
    """The tokens that both have, and one category for all others.

    If one side has no others, neither side's are compared, since that category would be impossible on one side only:
    tokens that both have are then compared on their own.
    """

    def __init__(self, mapping: VocabularyMap, student_RV: Tensor, teacher_RW: Tensor) -> None:
        self._mapping, self._student_RV = mapping, student_RV
        self._log_rest_R1 = _log_sum(student_RV[:, mapping.student_rest])
        teacher_log_rest_R1 = _log_sum(teacher_RW[:, mapping.teacher_rest])
        student_RM, teacher_RM = student_RV[:, mapping.student_ids_M], teacher_RW[:, mapping.teacher_ids_M]
        student_log_M_R1, teacher_log_M_R1 = _log_sum(student_RM), _log_sum(teacher_RM)
        self.student_mass_R = (student_log_M_R1 - self._log_rest_R1).sigmoid()[:, 0]
        self.teacher_mass_R = (teacher_log_M_R1 - teacher_log_rest_R1).sigmoid()[:, 0]
        self._has_rest = len(mapping.student_rest) > 0 and len(mapping.teacher_rest) > 0
        if self._has_rest or student_RM.shape[1] == 0:
            student_RM = torch.cat([student_RM, self._log_rest_R1], dim=1)
            teacher_RM = torch.cat([teacher_RM, teacher_log_rest_R1], dim=1)
        self.student_RC, self.teacher_RC = student_RM, teacher_RM
        M = len(mapping.student_ids_M)
        top_R = student_RM[:, :M].amax(dim=1) if M else torch.full_like(self.student_mass_R, -math.inf)
        self.has_token_on_top_R = top_R > self._log_rest_R1[:, 0] if self._has_rest else top_R > -math.inf

    def spread(self, gradient_RC: Tensor) -> Tensor:
        """Return the gradient [R, V] of the student's logits, given that of its categories."""
        mapping, M = self._mapping, len(self._mapping.student_ids_M)
        gradient_RV = torch.zeros_like(self._student_RV)
        gradient_RV[:, mapping.student_ids_M] = gradient_RC[:, :M]
        if gradient_RC.shape[1] > M and len(mapping.student_rest):
            share_RV = (self._student_RV[:, mapping.student_rest] - _shift(self._log_rest_R1)).exp()
            gradient_RV[:, mapping.student_rest] = gradient_RC[:, M:] * share_RV
        return gradient_RV


class _Groups(_Categories):
    """Groups of tokens."""

    def __init__(self, mapping: VocabularyMap, student_RV: Tensor, teacher_RW: Tensor) -> None:
        self._group_V, self._student_RV = mapping.student_group_V, student_RV
        self.student_RC = _log_sums(student_RV, mapping.student_group_V, mapping.groups)
        self.teacher_RC = _log_sums(teacher_RW, mapping.teacher_group_W, mapping.groups)
        self.has_token_on_top_R = torch.ones_like(student_RV[:, 0], dtype=torch.bool)

    def spread(self, gradient_RC: Tensor) -> Tensor:
        """Return the gradient [R, V] of the student's logits, given that of its categories."""
        share_RV = (self._student_RV - _shift(self.student_RC)[:, self._group_V]).exp()
        return share_RV.mul_(gradient_RC[:, self._group_V])


def _log_sum(logits_RV: Tensor) -> Tensor:
    """Return the log-sum-exp of each row; -inf if there are no logits."""
    if logits_RV.shape[1] == 0:
        return torch.full_like(logits_RV.new_empty(len(logits_RV), 1), -math.inf)
    return logits_RV.logsumexp(dim=1, keepdim=True)


def _log_sums(logits_RV: Tensor, group_V: Tensor, groups: int) -> Tensor:
    """Return the log-sum-exp of each group of each row; -inf for a group without logits."""
    group_RV = group_V.expand_as(logits_RV)
    top_RC = logits_RV.new_full((len(logits_RV), groups), -math.inf)
    # Each group has its own shift: under a common one, an improbable group would be impossible.
    top_RC = _shift(top_RC.scatter_reduce(1, group_RV, logits_RV, "amax"))
    e_RV = (logits_RV - top_RC[:, group_V]).exp()
    return torch.zeros_like(top_RC).scatter_add_(1, group_RV, e_RV).log() + top_RC


def _shift(top_RC: Tensor) -> Tensor:
    # Where all are -inf, shift by nothing: -inf - -inf would be NaN.
    return torch.where(top_RC == -math.inf, 0.0, top_RC)

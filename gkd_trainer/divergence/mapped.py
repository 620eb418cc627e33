"""The divergence from a teacher with another vocabulary.

Shapes: N tokens trained on, R rows of logits (tokens compared at once), V the student's vocabulary, W the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gkd_trainer.divergence.categories import CategoryTerms
from gkd_trainer.divergence.dense import compare_logits
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence, joined
from gkd_trainer.divergence.rows import RowComparison, cross_entropy, label_gradient, tile_size, tiles, top_or_zero
from gkd_trainer.divergence.uld import SortedTerms
from gkd_trainer.signals import VocabularyMap


def mapped_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NW: Tensor,
    mapping: VocabularyMap,
    *,
    objective: Objective,
    labels_N: Tensor | None = None,
    token_block: int | None = None,
) -> TokenDivergence:
    """Compare a student's logits [N, V] with a teacher's [N, W], token by token.

    The arguments are those of `loss.token_divergence`, which checks them; `token_block` tokens are compared at once.
    """
    return compare_logits(
        MappedComparison(objective, mapping),
        student_logits_NV,
        (teacher_logits_NW,),
        labels_N=labels_N,
        largest=token_block or tile_size(student_logits_NV),
    )


class Terms(Protocol):
    """Compares logits of both sides, divided by the temperature, in one of the modes."""

    def __call__(
        self, student_RV: Tensor, teacher_RW: Tensor, value_weight_R: Tensor | None
    ) -> tuple[TokenDivergence, Tensor | None]:
        """Return the result and, if values are weighted, the gradient [R, V] of the student's divided logits."""
        ...


@dataclass(frozen=True)
class MappedComparison(RowComparison):
    """Compares with a teacher's logits, one tensor [R, W] in the student's dtype; see `LogitsComparison`.

    The mode of `mapping` chooses how: "matched" or "next_byte", see `categories`; "uld" or "gold", see `uld`.
    """

    objective: Objective
    mapping: VocabularyMap
    softcap: float | None = None
    temporary: int | None = None

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
        (teacher_RW,) = teacher
        is_sorted = self.mapping.mode in ("uld", "gold")
        terms: Terms = (SortedTerms if is_sorted else CategoryTerms)(self.objective, self.mapping)
        parts = []
        for tile in self._tiles(student_RV, teacher_RW):
            labels, value_weight, label_weight = (
                None if tensor is None else tensor[tile] for tensor in (labels_R, value_weight_R, label_weight_R)
            )
            parts.append(self._compared(terms, student_RV[tile], teacher_RW[tile], labels, value_weight, label_weight))
        return joined(parts)

    def _compared(
        self,
        terms: Terms,
        student_RV: Tensor,
        teacher_RW: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
    ) -> TokenDivergence:
        temperature, shift_R1 = self.objective.temperature, top_or_zero(student_RV)
        # The largest logit cancels: left in, every log-sum-exp over tokens would round as coarsely as it.
        shifted_RV, shifted_RW = student_RV - shift_R1, teacher_RW - top_or_zero(teacher_RW)
        if temperature != 1:
            shifted_RV, shifted_RW = shifted_RV / temperature, shifted_RW / temperature
        result, gradient_RV = terms(shifted_RV, shifted_RW, value_weight_R)
        if labels_R is not None:
            log_z_R1 = (student_RV - shift_R1).logsumexp(dim=1, keepdim=True)
            result = replace(result, cross_entropy_N=cross_entropy(student_RV, shift_R1, log_z_R1, labels_R))
        if gradient_RV is not None:
            # What spreads the gradient of a row that is not finite is not finite either.
            gradient_RV = torch.where(result.is_finite_N[:, None], gradient_RV / temperature, 0.0)
            if labels_R is not None and label_weight_R is not None and result.cross_entropy_N is not None:
                q_RV = (student_RV - shift_R1 - log_z_R1).exp()
                gradient_RV += label_gradient(q_RV, labels_R, label_weight_R, result.cross_entropy_N)
            if self.softcap is not None:
                factor_RV = 1 - (student_RV / self.softcap) ** 2
                gradient_RV = torch.where(factor_RV.isfinite(), gradient_RV * factor_RV, 0.0)
            student_RV.copy_(gradient_RV)
        return result

    def _tiles(self, student_RV: Tensor, teacher_RW: Tensor) -> Iterator[slice]:
        largest = min(tile_size(student_RV), tile_size(teacher_RW))
        if self.temporary is not None:
            largest = min(largest, self.temporary // max(student_RV.shape[1], teacher_RW.shape[1]))
        return tiles(len(student_RV), max(1, largest))

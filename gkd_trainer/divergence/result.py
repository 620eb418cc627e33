"""The result of comparing student and teacher at each token.

Shapes: N tokens: all that are trained on, or those of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenDivergence:
    """The divergence of each token, and statistics computed along with it.

    `values_N`, `cross_entropy_N` and `loss_N` carry gradients to the student; the statistics carry none. To add a
    statistic, add a field here, None for a path that does not compute it, and its computation. All flags stay on the
    device.

    Attributes:
        values_N: in nats; float32, or float64 for float64 inputs.
        cross_entropy_N: in nats at temperature 1; None if no labels were given.
        student_entropy_N: in nats, of q as compared: at the loss temperature.
        teacher_entropy_N: likewise for p; for a top-k teacher over the categories compared, where the tail counts as
            one: a lower bound of its entropy.
        agrees_N: True where both sides have the same top token.
        is_teacher_finite_N: False where the teacher's logits held NaN or +inf, or were all -inf; for a top-k teacher,
            where its log-probs held NaN, had a mass above one or an id outside the vocabulary, or had no entry.
        is_finite_N: False where the value is not finite; its gradient is then zero.
        teacher_mass_N: the mass of p on a top-k teacher's entries; None for other teachers.
        student_mass_N: likewise for q.
        teacher_matched_mass_N: for a teacher with another vocabulary, the mass of p on the tokens that both have; None
            for other teachers.
        student_matched_mass_N: likewise for q.
        is_grouped_N: likewise, True where groups of tokens were compared instead.
        loss_N: the loss if labels are weighted, (1 - weight)·value + weight·cross entropy, else None.
    """

    values_N: Tensor
    cross_entropy_N: Tensor | None
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    agrees_N: Tensor
    is_teacher_finite_N: Tensor
    is_finite_N: Tensor
    teacher_mass_N: Tensor | None = None
    student_mass_N: Tensor | None = None
    teacher_matched_mass_N: Tensor | None = None
    student_matched_mass_N: Tensor | None = None
    is_grouped_N: Tensor | None = None
    loss_N: Tensor | None = None

    def new_empty(self, N: int) -> TokenDivergence:
        """Return uninitialised fields for N tokens, with the same dtypes, and None for the same fields."""
        fields: dict[str, Any] = {
            name: None if field_N is None else field_N.new_empty(N) for name, field_N in vars(self).items()
        }
        return TokenDivergence(**fields)

    def write(self, tile: slice, part: TokenDivergence) -> None:
        """Copy the fields of `part` into those of the tokens in `tile`."""
        for field_N, of_part_N in zip(vars(self).values(), vars(part).values(), strict=True):
            if field_N is not None:
                field_N[tile] = of_part_N


def joined(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    """Return consecutive parts, at least one, concatenated field by field."""
    fields: dict[str, Any] = {
        name: None if field_N is None else torch.cat([getattr(part, name) for part in parts])
        for name, field_N in vars(parts[0]).items()
    }
    return TokenDivergence(**fields)


def mixed_loss(values_N: Tensor, cross_entropy_N: Tensor, label_weight_N: Tensor) -> Tensor:
    """Return (1 - weight)·value + weight·cross entropy of each token; a term of weight zero may be infinite."""
    from_values_N = torch.where(label_weight_N == 1, 0.0, (1 - label_weight_N) * values_N)
    return from_values_N + torch.where(label_weight_N == 0, 0.0, label_weight_N * cross_entropy_N)

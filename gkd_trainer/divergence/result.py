"""The result of comparing student and teacher at each token.

Shapes: N tokens: all that are trained on, or those of a tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenDivergence:
    """The divergence of each token, and statistics computed along with it.

    `values_N`, `cross_entropy_N` and `loss_N` carry gradients to the student; the statistics carry none. To add a
    statistic, add a field here, None for a path that does not compute it, and its computation. All flags stay on the
    device.

    Attributes:
        values_N: in nats if the divergence is (see `options.unit_of`); float32, or float64 for float64 inputs.
        cross_entropy_N: in nats at temperature 1; None if no labels were given.
        student_entropy_N: in nats, of q as compared: at the loss temperature.
        teacher_entropy_N: likewise for p; for a top-k teacher over the categories compared, where the tail counts as
            one: a lower bound of its entropy.
        agrees_N: True where both sides have the same top token; for a weighted sum, the mean over its teachers.
        is_teacher_finite_N: False where the teacher's logits held NaN or +inf, or were all -inf; for a top-k teacher,
            where its log-probs held NaN, had a mass above one or an id outside the vocabulary.
        is_finite_N: False where the value is not finite; its gradient is then zero. It is NaN if the largest logits of
            both sides differ by more than their precision can compare (8e6 in float32).
        acceptance_N: Σ min(p, q), the probability that speculative decoding accepts a token that the student drafts for
            the teacher (Leviathan et al. 2023, arXiv 2211.17192); for a top-k teacher over the categories compared: an
            upper bound if the tail is one of them, no bound if both sides are renormalized. None for a comparison that
            is not token by token.
        teacher_mass_N: the mass of p on a top-k teacher's entries; None for other teachers, and NaN at their positions
            if only some are such teachers.
        student_mass_N: likewise for q.
        teacher_matched_mass_N: for a teacher with another vocabulary, the mass of p on the tokens that both have; None
            for other teachers.
        student_matched_mass_N: likewise for q.
        is_grouped_N: likewise, True where groups of tokens were compared instead; for a weighted sum, a mean.
        loss_N: the loss if labels are weighted, (1 - weight)·value + weight·cross entropy, else None.
        terms_NT: the divergence from each of T teachers in a weighted sum, without weights or gradients; else None.
    """

    values_N: Tensor
    cross_entropy_N: Tensor | None
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    agrees_N: Tensor
    is_teacher_finite_N: Tensor
    is_finite_N: Tensor
    acceptance_N: Tensor | None = None
    teacher_mass_N: Tensor | None = None
    student_mass_N: Tensor | None = None
    teacher_matched_mass_N: Tensor | None = None
    student_matched_mass_N: Tensor | None = None
    is_grouped_N: Tensor | None = None
    loss_N: Tensor | None = None
    terms_NT: Tensor | None = None

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
    """Return consecutive parts, at least one, concatenated field by field.

    A field that only some parts have is NaN in the others.
    """
    fields: dict[str, Any] = {}
    for name in vars(parts[0]):
        found = [getattr(part, name) for part in parts]
        if all(field_N is None for field_N in found):
            fields[name] = None
            continue
        missing = [part.values_N.new_full((len(part.values_N),), math.nan) for part in parts]
        fields[name] = torch.cat([b if a is None else a for a, b in zip(found, missing, strict=True)])
    return TokenDivergence(**fields)


def reordered(result: TokenDivergence, order_N: Tensor) -> TokenDivergence:
    """Return a result for the positions `order_N` in ascending order of positions; gradients pass."""
    fields: dict[str, Any] = {
        name: None if field_N is None else torch.empty_like(field_N).index_copy(0, order_N, field_N)
        for name, field_N in vars(result).items()
    }
    return TokenDivergence(**fields)


def weighted_sum(parts: Sequence[TokenDivergence], weights: Sequence[float]) -> TokenDivergence:
    """Return the weighted sum of one comparison of the same tokens with each of several teachers.

    Entropies, agreements, acceptances and masses are means by weight. Cross entropies are taken from the last part that
    has any.
    """
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]

    def mean(fields: Sequence[Tensor | None]) -> Tensor | None:
        found = [(weight, field_N) for weight, field_N in zip(weights, fields, strict=True) if field_N is not None]
        total = sum(weight for weight, _ in found)
        terms = [weight / total * field_N for weight, field_N in found]
        return None if not terms else functools.reduce(torch.add, terms)

    def every(flags: Sequence[Tensor]) -> Tensor:
        return functools.reduce(torch.logical_and, flags)

    return TokenDivergence(
        values_N=functools.reduce(torch.add, [w * part.values_N for w, part in zip(weights, parts, strict=True)]),
        cross_entropy_N=next((p.cross_entropy_N for p in reversed(parts) if p.cross_entropy_N is not None), None),
        student_entropy_N=cast("Tensor", mean([part.student_entropy_N for part in parts])),
        teacher_entropy_N=cast("Tensor", mean([part.teacher_entropy_N for part in parts])),
        agrees_N=cast("Tensor", mean([part.agrees_N for part in parts])),
        is_teacher_finite_N=every([part.is_teacher_finite_N for part in parts]),
        is_finite_N=every([part.is_finite_N for part in parts]),
        acceptance_N=mean([part.acceptance_N for part in parts]),
        teacher_mass_N=mean([part.teacher_mass_N for part in parts]),
        student_mass_N=mean([part.student_mass_N for part in parts]),
        teacher_matched_mass_N=mean([part.teacher_matched_mass_N for part in parts]),
        student_matched_mass_N=mean([part.student_matched_mass_N for part in parts]),
        is_grouped_N=mean([part.is_grouped_N for part in parts]),
        terms_NT=torch.stack([part.values_N.detach() for part in parts], dim=1),
    )


def mixed_loss(values_N: Tensor, cross_entropy_N: Tensor, label_weight_N: Tensor) -> Tensor:
    """Return (1 - weight)·value + weight·cross entropy of each token; a term of weight zero may be infinite."""
    from_values_N = torch.where(label_weight_N == 1, 0.0, (1 - label_weight_N) * values_N)
    return from_values_N + torch.where(label_weight_N == 0, 0.0, label_weight_N * cross_entropy_N)

"""What a comparison of student and teacher says of each token.

Shapes: N tokens trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenDivergence:
    """The divergence of each token, and what was seen on the way to it.

    `values_N` (nats; float32, or float64 for float64 inputs), `cross_entropy_N` (nats at temperature 1; None if no
    labels were given) and `loss_N` carry gradients to the student's side; the rest carries none.
    `student_entropy_N` and `teacher_entropy_N` are in nats, of q and p as compared: at the loss temperature.
    `agrees_N` is True where both sides have the same top token. `is_teacher_finite_N` is False where the
    teacher's logits held NaN or +inf, or were all -inf; of a top-k teacher, where its log-probs held NaN, had a
    mass above one or an id outside the vocabulary, or there was no entry. `is_finite_N` is False where the value
    is not finite; such a value passes back a gradient of zero. All flags stay on the device.

    For a top-k teacher, `teacher_mass_N` and `student_mass_N` are the mass of p and of q on its entries, and
    `teacher_entropy_N` is over the categories compared: with the tail as one, a lower bound of its entropy.

    `loss_N` is what is minimised where labels are weighted, (1 - weight)·value + weight·cross entropy, else None.
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
    loss_N: Tensor | None = None


def mixed_loss(values_N: Tensor, cross_entropy_N: Tensor, label_weight_N: Tensor) -> Tensor:
    """Return (1 - weight)·value + weight·cross entropy of each token; what has weight zero may be infinite."""
    from_values_N = torch.where(label_weight_N == 1, 0.0, (1 - label_weight_N) * values_N)
    return from_values_N + torch.where(label_weight_N == 0, 0.0, label_weight_N * cross_entropy_N)

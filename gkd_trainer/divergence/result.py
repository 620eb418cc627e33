"""What a comparison of student and teacher says of each token.

Shapes: N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenDivergence:
    """The divergence of each token, and what was seen on the way to it.

    `values_N` (nats; float32, or float64 for float64 inputs) and `cross_entropy_N` (nats at temperature 1;
    None if no labels were given) carry gradients to the student's side; the rest carries none.
    `student_entropy_N` and `teacher_entropy_N` are in nats, of q and p as compared: at the loss temperature.
    `agrees_N` is True where both sides have the same top token. `is_teacher_finite_N` is False where the
    teacher's logits held NaN or +inf, or were all -inf. `is_finite_N` is False where the value is not finite;
    such a value passes back a gradient of zero. All flags stay on the device.
    """

    values_N: Tensor
    cross_entropy_N: Tensor | None
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    agrees_N: Tensor
    is_teacher_finite_N: Tensor
    is_finite_N: Tensor

    @classmethod
    def concatenated(cls, blocks: Sequence[TokenDivergence]) -> TokenDivergence:
        """Join the results of consecutive blocks of tokens; either all of them or none have labels."""
        cross_entropies = [block.cross_entropy_N for block in blocks if block.cross_entropy_N is not None]
        return cls(
            values_N=torch.cat([block.values_N for block in blocks]),
            cross_entropy_N=torch.cat(cross_entropies) if cross_entropies else None,
            student_entropy_N=torch.cat([block.student_entropy_N for block in blocks]),
            teacher_entropy_N=torch.cat([block.teacher_entropy_N for block in blocks]),
            agrees_N=torch.cat([block.agrees_N for block in blocks]),
            is_teacher_finite_N=torch.cat([block.is_teacher_finite_N for block in blocks]),
            is_finite_N=torch.cat([block.is_finite_N for block in blocks]),
        )

"""The check that logits and divergences are finite: flagged on the device, read once per window.

Shapes: B batch, N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gkd_trainer.errors import GKDNumericsError


class FiniteCheck:
    """Collects which samples of a window's micro-batches had non-finite values."""

    def __init__(self) -> None:
        self._bad_B2: list[Tensor] = []

    def add(self, rows_N: Tensor, batch_size: int, is_teacher_finite_N: Tensor, is_finite_N: Tensor) -> None:
        """Add a micro-batch: the sample of each token, and whether the teacher's logits and the value were finite."""
        bad_N2 = torch.stack([~is_teacher_finite_N, ~is_finite_N], dim=1).long()
        self._bad_B2.append(bad_N2.new_zeros(batch_size, 2).index_add_(0, rows_N, bad_N2))

    def clear(self) -> None:
        """Forget the window."""
        self._bad_B2 = []

    def raise_if_not(self, step: int, rank: int, reduce: Callable[[Tensor], Tensor] = lambda flag: flag) -> None:
        """Read the flags and raise GKDNumericsError for the first flagged sample.

        If one rank must raise, all raise: otherwise the others would wait for it in their next exchange.

        Args:
            step: The next optimizer step, from 1, for the message.
            rank: This rank, for the message.
            reduce: Sums a tensor over ranks.
        """
        if not self._bad_B2 or not reduce(torch.cat(self._bad_B2).any().long()):
            return
        for micro_batch, bad_B2 in enumerate(self._bad_B2):
            for sample, (teacher_tokens, tokens) in enumerate(bad_B2.tolist()):
                if teacher_tokens or tokens:
                    raise GKDNumericsError(
                        f"step {step}, rank {rank}, micro-batch {micro_batch}, sample {sample}: "
                        f"{_cause(teacher_tokens, tokens)}. The optimizer has not taken this step, and earlier "
                        "checkpoints are valid. Look at that sample, the dtype of both models and the learning rate"
                    )
        raise GKDNumericsError(f"step {step}, rank {rank}: stopped, since another rank found non-finite values")


def _cause(teacher_tokens: int, tokens: int) -> str:
    if teacher_tokens:
        return f"the teacher's logits hold NaN or +inf at {teacher_tokens} of its tokens, or its top tokens are invalid"
    return (
        f"the loss is not finite at {tokens} of its tokens: the student's logits hold NaN or +inf, one model gives a "
        "token probability 0 (a logit of -inf), which makes the divergence infinite, or a label is not in the shared "
        "vocabulary"
    )

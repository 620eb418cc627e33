"""The check that logits and divergences are finite: flagged on the device, read once a window.

Shapes: B batch, N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gkd_trainer.errors import GKDNumericsError


class FiniteCheck:
    """Collects, over the micro-batches of a window, which samples had values that are not finite."""

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
        """Read the flags and raise GKDNumericsError for the first sample that has one.

        All ranks raise where one of them has to: the others would wait for it in their next exchange.

        Args:
            step: The optimizer step that would be taken next, from 1, for the message.
            rank: The rank that this runs on, for the message.
            reduce: Adds a tensor up over ranks.
        """
        if not self._bad_B2 or not reduce(torch.cat(self._bad_B2).any().long()):
            return
        for micro_batch, bad_B2 in enumerate(self._bad_B2):
            for sample, (teacher_tokens, tokens) in enumerate(bad_B2.tolist()):
                if teacher_tokens or tokens:
                    raise GKDNumericsError(
                        f"step {step}, rank {rank}, micro-batch {micro_batch}, sample {sample}: "
                        f"{_cause(teacher_tokens, tokens)}. The optimizer has not taken this step, and what was saved "
                        "before it stands. Look at that sample, the dtype of both models and the learning rate"
                    )
        raise GKDNumericsError(f"step {step}, rank {rank}: stopped, since another rank met values that are not finite")


def _cause(teacher_tokens: int, tokens: int) -> str:
    if teacher_tokens:
        return (
            f"the teacher's logits hold NaN or +inf at {teacher_tokens} of its tokens, or its top tokens no probability"
        )
    return (
        f"the loss is not finite at {tokens} of its tokens: the student's logits hold NaN or +inf, one model gives a "
        "token probability 0 (a logit of -inf) where the divergence is then infinite, or a label is no token of the "
        "shared vocabulary"
    )

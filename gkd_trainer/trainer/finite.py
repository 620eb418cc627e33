"""The check that logits and divergences are finite: flagged on the device, read before the optimizer steps.

Shapes: B batch, N tokens trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gkd_trainer.errors import GKDNumericsError
from gkd_trainer.transfer import HostCopy


class FiniteCheck:
    """Collects which samples of a window's micro-batches had non-finite values.

    `begin_reading` after the window's last forward, and `raise_if_not` after its backward: then the host waits for the
    forward alone, while the device still has the whole backward before it, and is never idle for it. If the backward
    takes the optimizer's step, `raise_if_not` must come before it.

    Args:
        beside: Returns further sums of the window [K], on a device. They are summed over ranks and read together with
            the flags, and need no exchange of their own.
    """

    def __init__(self, beside: Callable[[torch.device], Tensor] = lambda device: torch.empty(0, device=device)) -> None:
        self._bad_B2: list[Tensor] = []
        self._beside = beside
        self._sums: HostCopy | None = None  # whether any flag is set, and what is beside

    def add(self, rows_N: Tensor, batch_size: int, is_teacher_finite_N: Tensor, is_finite_N: Tensor) -> None:
        """Add a micro-batch: the sample of each token, and whether the teacher's logits and the value were finite."""
        bad_N2 = torch.stack([~is_teacher_finite_N, ~is_finite_N], dim=1).long()
        self._bad_B2.append(bad_N2.new_zeros(batch_size, 2).index_add_(0, rows_N, bad_N2))
        self._sums = None

    def clear(self) -> None:
        """Forget the window."""
        self._bad_B2, self._sums = [], None

    def begin_reading(self, reduce: Callable[[Tensor], Tensor] = lambda flag: flag) -> None:
        """Begin to read whether any flag is set, on any rank: if one must raise, all do.

        Otherwise the others would wait for it in their next exchange.

        Args:
            reduce: Sums a tensor over ranks, which all call this together.
        """
        if self._bad_B2:
            is_bad_1 = torch.cat(self._bad_B2).any().float()[None]
            self._sums = HostCopy(reduce(torch.cat([is_bad_1, self._beside(is_bad_1.device)])))

    def raise_if_not(self, step: int, rank: int, reduce: Callable[[Tensor], Tensor] = lambda flag: flag) -> list[float]:
        """Raise GKDNumericsError for the first flagged sample, if any is flagged; else return the sums beside.

        They are over all ranks, and empty if nothing was added.

        Args:
            step: The next optimizer step, from 1, for the message.
            rank: This rank, for the message.
            reduce: As in `begin_reading`, which this calls if nothing has begun since the last flags were added.
        """
        if self._sums is None:
            self.begin_reading(reduce)
        if self._sums is None:
            return []
        sums = self._sums.read()
        if not sums[0]:
            beside: list[float] = sums[1:].tolist()
            return beside
        for micro_batch, bad_B2 in enumerate(self._bad_B2):
            for sample, (teacher_tokens, tokens) in enumerate(bad_B2.tolist()):
                if teacher_tokens or tokens:
                    raise GKDNumericsError(
                        f"step {step}, rank {rank}, micro-batch {micro_batch}, sample {sample}: "
                        f"{_cause(teacher_tokens, tokens)}. The optimizer has not taken this step, and earlier "
                        "checkpoints are valid. Look at that sample, the dtype of both models and the learning rate"
                    )
        raise GKDNumericsError(f"step {step}, rank {rank}: stopped, since another rank found non-finite values")


def has_finite_weights(model: nn.Module) -> bool:
    """Return whether the weights that are trained are finite; of sharded ones, those that this rank holds."""
    # Under ZeRO-3, DeepSpeed keeps them beside the parameter; under FSDP version 2, the parameter is a DTensor.
    held = (getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad)
    local = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in held)
    return all(bool(weight.isfinite().all()) for weight in local)


def steps_in_backward(optim: str) -> bool:
    """Return whether an optimizer of Trainer takes its step in the backward, as DeepSpeed's engine does with any."""
    return optim in ("lomo", "adalomo") or optim.endswith("_layerwise")


def _cause(teacher_tokens: int, tokens: int) -> str:
    if teacher_tokens:
        return f"the teacher's logits hold NaN or +inf at {teacher_tokens} of its tokens, or its top tokens are invalid"
    return (
        f"the loss is not finite at {tokens} of its tokens: the student's logits hold NaN or +inf, one model gives a "
        "token probability 0 (a logit of -inf), which makes the divergence infinite, the models' largest logits differ "
        "by more than float32 can compare (8e6), or a label is not in the shared vocabulary"
    )

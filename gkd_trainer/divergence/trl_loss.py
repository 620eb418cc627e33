"""TRL's static `GKDTrainer.generalized_jsd_loss` with less memory, for code that calls it.

Shapes: N the positions of all leading axes, V vocabulary; arguments keep TRL's names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence.loss import generalized_jsd
from gkd_trainer.divergence.options import checked_objective
from gkd_trainer.divergence.reference import elementwise_jsd
from gkd_trainer.errors import GKDConfigError

_REDUCTIONS = ("batchmean", "sum", "mean", "none")


def trl_generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Return the same as `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss` of TRL 1.16, in float32.

    Args:
        student_logits: [..., V], usually [batch, length, V]; gradients reach it.
        teacher_logits: the same shape.
        labels: [...], IGNORE_INDEX at positions that do not count; None counts all.
        beta: in [0, 1]; 0 is the forward KL(teacher‖student), 1 the reverse KL.
        temperature: positive; both sides are softmax(logits / temperature).
        reduction: "batchmean" divides the sum by the number of counted positions or, without labels, by the
            size of the first axis; "sum"; "mean" is over positions and vocabulary; "none" keeps both, as
            [counted positions, V] with labels and [..., V] without; only this needs several tensors of that size.
        num_items_in_batch: if given, the sum is divided by it, whatever the reduction.

    Raises:
        GKDConfigError: an unknown reduction, an option out of range, or shapes that don't fit together.
    """
    _check(student_logits, teacher_logits, labels, reduction)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    checked_objective(beta=beta, temperature=temperature, dtype=dtype)
    if reduction == "none" and num_items_in_batch is None:
        return _elementwise(student_logits, teacher_logits, labels, beta, temperature)

    V = student_logits.shape[-1]
    values_N = generalized_jsd(
        student_logits.reshape(-1, V), teacher_logits.reshape(-1, V), beta=beta, temperature=temperature
    )
    is_counted_N = torch.ones_like(values_N, dtype=torch.bool)
    if labels is not None:
        is_counted_N = labels.reshape(-1) != IGNORE_INDEX
    total = torch.where(is_counted_N, values_N, 0.0).sum()
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / (is_counted_N.sum() * V)
    if labels is None:
        return total / max(student_logits.shape[0], 1)
    return total / is_counted_N.sum().clamp_min(1)


def _elementwise(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, beta: float, temperature: float
) -> Tensor:
    if labels is not None:
        is_counted = labels != IGNORE_INDEX
        student_logits, teacher_logits = student_logits[is_counted], teacher_logits[is_counted]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    with torch.autocast(student_logits.device.type, enabled=False):
        return elementwise_jsd(student_logits.to(dtype), teacher_logits.to(dtype), beta=beta, temperature=temperature)


def _check(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        expected = ", ".join(map(repr, _REDUCTIONS))
        raise GKDConfigError(f"reduction must be one of {expected}; got {reduction!r}")
    if student_logits.shape != teacher_logits.shape:
        raise GKDConfigError(
            "student_logits and teacher_logits must have the same shape [..., V]; got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}: slice to a shared vocabulary"
        )
    if labels is not None and labels.shape != student_logits.shape[:-1]:
        raise GKDConfigError(
            "labels must have the logits' shape without the vocabulary, "
            f"{list(student_logits.shape[:-1])}; got {list(labels.shape)}"
        )

"""The loss of a micro-batch, from a teacher's signal and a student's forward.

Shapes: B batch, L length, N tokens trained on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.config import GKDArguments
from gkd_trainer.divergence import TokenDivergence, token_divergence
from gkd_trainer.divergence.options import PRODUCT_DTYPES
from gkd_trainer.models.heads import (
    InseparableHead,
    SeparableHead,
    compare,
    connection,
    router_loss_coefficient,
    router_loss_of,
    without_router_logits,
)
from gkd_trainer.models.loading import refuse_unread_media
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.types import TokenBatch

Observer = Callable[[TokenBatch, StudentSignal, Signal, TokenDivergence], None]
"""Sees a comparison: the batch, the student's and the teacher's predictions, and the result."""


@dataclass(frozen=True)
class Comparison:
    """The divergence of a student from a teacher's predictions for a batch, as the options define it.

    With `is_training`, the loss mixes in the cross-entropy of the data's tokens (`ce_weight`), but not of on-policy
    samples, whose tokens are not targets. The models are compared over the first `vocab_size` tokens, the only ones
    that `teacher` predicts over. For tokens whose log-probability the rollout engine told, the result has the student's
    cross entropy too, to be compared with it. `product_dtype` is the dtype to which matrix products round. `observe` is
    called with the batch, both models' predictions and the result.
    """

    args: GKDArguments
    batch: TokenBatch
    teacher: Signal
    vocab_size: int
    is_training: bool
    product_dtype: torch.dtype | None = None
    observe: Observer | None = None

    def __call__(self, student: StudentSignal) -> TokenDivergence:
        """Return the divergence of each token trained on."""
        student = student.sliced(self.vocab_size)
        result = self._compared(student)
        if self.observe is not None:
            self.observe(self.batch, student, self.teacher, result)
        return result

    def _compared(self, student: StudentSignal) -> TokenDivergence:
        args, labels_N, label_weight_N = self.args, None, None
        if args.ce_weight > 0 and self.is_training:
            labels_N = self.batch.targets_N
            label_weight_N = args.ce_weight * ~self.batch.is_on_policy_B[self.batch.rows_N]
        elif self.is_training and self.batch.sampling_log_probs_N is not None:
            labels_N = self.batch.targets_N.masked_fill(self.batch.sampling_log_probs_N.isnan(), IGNORE_INDEX)
        return token_divergence(
            student,
            self.teacher,
            beta=args.beta,
            divergence=args.divergence,
            divergence_options=cast("dict[str, float] | None", args.divergence_options),  # JSON is parsed already
            temperature=args.loss_temperature,
            scale=args.divergence_scale,
            tail=args.teacher_tail,
            labels_N=labels_N,
            label_weight_N=label_weight_N,
            product_dtype=self.product_dtype,
            workspace_mb=args.loss_workspace_mb,
        )


@dataclass(frozen=True)
class StudentOutput:
    """The result of a student's forward: the divergence of each token, the sum to minimise, and the model's outputs.

    `router_loss` is set for a mixture of experts that trains on it, else None; `outputs` are the model's, with full
    logits [B, L, V] if requested.
    """

    tokens: TokenDivergence
    loss_sum: Tensor
    router_loss: RouterLoss | None
    outputs: Any


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a micro-batch, a mean over its tokens, and its coefficient."""

    value: Tensor
    coefficient: float

    def weighted(self, device: torch.device) -> Tensor:
        """Return the product, on the device of the rest of the loss."""
        return self.coefficient * self.value.to(device)


def run_student(
    model: nn.Module,
    student: nn.Module,
    batch: TokenBatch,
    head: SeparableHead | InseparableHead,
    comparison: Comparison,
    *,
    keeps_logits: bool = False,
    is_output_awaited: bool = False,
) -> StudentOutput:
    """Run a student's forward, and compare it with its teacher inside the forward.

    Args:
        model: The student, wrapped for distribution or not.
        student: The causal LM inside it.
        batch: The micro-batch to compare on.
        head: The student's head.
        comparison: The comparison to make with its predictions.
        keeps_logits: Whether `outputs` must hold full logits.
        is_output_awaited: Whether what wraps the student acts once the gradient of its output is there.
    """
    refuse_unread_media(student, batch.model_inputs, "student")
    if keeps_logits and isinstance(head, SeparableHead):
        head = InseparableHead("the caller wants logits", head.module)
    if isinstance(head, InseparableHead) and comparison.args.loss_product_dtype in ("bfloat16", "float16"):
        head = InseparableHead(head.reason)  # asked to round, so autocast may
    coefficient = router_loss_coefficient(student) if comparison.is_training else 0.0
    forward_kwargs = {"output_router_logits": True} if coefficient else without_router_logits(student)
    # The loss reaches the output by the hidden states: a zero gradient of the head's whole weight would take memory.
    is_output_hidden = isinstance(head, SeparableHead) and (
        head.is_sharded or (is_output_awaited and batch.n_scored > 0)
    )
    tokens, outputs = compare(model, batch, head, comparison, is_output_hidden=is_output_hidden, **forward_kwargs)
    loss_sum = (tokens.values_N if tokens.loss_N is None else tokens.loss_N).sum()
    # Without tokens to train on the sum is empty, but DDP needs it connected to the head.
    if batch.n_scored == 0 or is_output_hidden:
        loss_sum = loss_sum + connection(outputs)
    router_loss = router_loss_of(outputs) if coefficient else None
    return StudentOutput(
        tokens, loss_sum, None if router_loss is None else RouterLoss(router_loss, coefficient), outputs
    )


def divided(loss_sum: Tensor, divisor: Tensor | int, averaging_ranks: int = 1) -> Tensor:
    """Return a sum divided by a number of tokens, or by 1 if that is 0.

    `averaging_ranks` is the number of ranks over which the gradient is averaged although the divisor counts all ranks.
    """
    if isinstance(divisor, Tensor):
        loss = loss_sum / divisor.to(loss_sum.device).clamp_min(1)
    else:  # not made a tensor, whose copy would wait for the device
        loss = loss_sum / max(divisor, 1)
    return loss if averaging_ranks == 1 else loss * averaging_ranks


def product_dtype(args: Any, mixed_precision: str) -> torch.dtype | None:
    """Return the dtype to which the divergence's products round; not asked of autocast, which only covers the model."""
    name: str = args.loss_product_dtype
    if name == "auto":
        if args.device.type != "cuda":
            return None
        name = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision, name)
    return PRODUCT_DTYPES.get(name)

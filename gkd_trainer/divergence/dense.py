"""The divergence from logits, with a closed-form gradient, in passes over chunks of the vocabulary.

Shapes: N tokens, V vocabulary, C one chunk of it.
p = teacher, q = student, both softmax(logits / T), m = beta·p + (1 - beta)·q, gap = log q - log p,
log_z = the log-normaliser of a side. A probability that is zero in the computation's dtype counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.batch import IGNORE_INDEX
from gkd_trainer.divergence.result import TokenDivergence

_CPU_CHUNK_ELEMENTS = 2**18
"""A temporary under the default chunk: 1 MiB in float32, so that what is alive at once stays in cache."""

_CHUNK_ELEMENTS = 2**24
"""The same off the CPU, where many small kernels cost more than 64 MiB a temporary."""


def dense_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
    labels_N: Tensor | None = None,
    vocab_chunk: int | None = None,
) -> TokenDivergence:
    """Compare two sets of logits [N, V] token by token.

    The arguments are those of `loss.token_divergence`, which checks them. No tensor of N×V elements is made
    but the gradient of the student's logits, in their dtype.
    """
    N, V = student_logits_NV.shape
    chunk = vocab_chunk or max(256, temporary_elements(student_logits_NV.device) // max(N, 1))
    objective = _Objective(beta, temperature, is_continuous=scale == "continuous")
    outputs = _DenseDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, teacher_logits_NV.detach(), labels_N, objective, min(chunk, V)
    )
    return TokenDivergence(*outputs)


def temporary_elements(device: torch.device) -> int:
    """Return how many elements a temporary has under the default chunk on that device."""
    return _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS


def mask_cross_entropy(cross_entropy_N: Tensor, labels_N: Tensor, V: int) -> Tensor:
    """Return +inf where the label is no token of the vocabulary, 0 where it is IGNORE_INDEX, else what was given."""
    is_outside_N = (labels_N < 0) | (labels_N >= V)
    return cross_entropy_N.masked_fill(is_outside_N, math.inf).masked_fill(labels_N == IGNORE_INDEX, 0.0)


@dataclass(frozen=True)
class _Objective:
    """weight_p·KL(p‖m) + weight_q·KL(q‖m), where the ends of beta have KL(p‖q) or KL(q‖p) alone."""

    beta: float
    temperature: float
    is_continuous: bool

    @property
    def weight_p(self) -> float:
        if self.beta in (0, 1):
            return 1.0 - self.beta
        return 1 / (1 - self.beta) if self.is_continuous else self.beta

    @property
    def weight_q(self) -> float:
        if self.beta in (0, 1):
            return float(self.beta)
        return 1 / self.beta if self.is_continuous else 1 - self.beta

    def log_p_over_other(self, gap_NC: Tensor) -> Tensor:
        """Return log(p/m), or log(p/q) at beta 0."""
        if self.beta == 0:
            return -gap_NC
        return _log_over_mixture(-gap_NC, math.log(self.beta), math.log1p(-self.beta))

    def log_q_over_other(self, gap_NC: Tensor) -> Tensor:
        """Return log(q/m), or log(q/p) at beta 1."""
        if self.beta == 1:
            return gap_NC
        return _log_over_mixture(gap_NC, math.log1p(-self.beta), math.log(self.beta))


class _DenseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: Tensor,
        teacher_logits_NV: Tensor,
        labels_N: Tensor | None,
        objective: _Objective,
        chunk: int,
    ) -> tuple[Tensor | None, ...]:
        pair = _Pair(student_logits_NV, teacher_logits_NV, objective.temperature, chunk)
        log_z_q_N, top_q_N = _scan(student_logits_NV, objective.temperature, chunk, pair.dtype)
        log_z_p_N, top_p_N = _scan(teacher_logits_NV, objective.temperature, chunk, pair.dtype)

        kl_p_N, kl_q_N, entropy_p_N, entropy_q_N = (torch.zeros_like(log_z_q_N) for _ in range(4))
        for _, log_q_NC, log_p_NC, gap_NC in pair.chunks(log_z_q_N, log_z_p_N):
            q_NC, p_NC = log_q_NC.exp(), log_p_NC.exp()
            entropy_q_N -= _weighted(q_NC, log_q_NC).sum(dim=1)
            entropy_p_N -= _weighted(p_NC, log_p_NC).sum(dim=1)
            if objective.weight_p:
                kl_p_N += _weighted(p_NC, objective.log_p_over_other(gap_NC)).sum(dim=1)
            if objective.weight_q:
                kl_q_N += _weighted(q_NC, objective.log_q_over_other(gap_NC)).sum(dim=1)
        values_N = objective.weight_p * kl_p_N + objective.weight_q * kl_q_N

        is_finite_N = values_N.isfinite()
        is_teacher_finite_N = log_z_p_N.isfinite()
        agrees_N = (top_q_N == top_p_N) & is_teacher_finite_N & log_z_q_N.isfinite()

        log_z_plain_N = cross_entropy_N = None
        if labels_N is not None:
            log_z_plain_N = log_z_q_N
            if objective.temperature != 1:
                log_z_plain_N, _ = _scan(student_logits_NV, 1.0, chunk, pair.dtype)
            cross_entropy_N = _cross_entropy(student_logits_NV, labels_N, log_z_plain_N)

        ctx.objective, ctx.chunk = objective, chunk
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(student_logits_NV, teacher_logits_NV, labels_N),
            *(log_z_q_N, log_z_p_N, log_z_plain_N, kl_q_N, is_finite_N, cross_entropy_N),
        )
        ctx.mark_non_differentiable(entropy_q_N, entropy_p_N, agrees_N, is_teacher_finite_N, is_finite_N)
        return values_N, cross_entropy_N, entropy_q_N, entropy_p_N, agrees_N, is_teacher_finite_N, is_finite_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream_values_N, upstream_cross_entropy_N = upstream[:2]
        student_logits_NV, teacher_logits_NV, labels_N, *per_token = ctx.saved_tensors
        log_z_q_N, log_z_p_N, log_z_plain_N, kl_q_N, is_finite_N, cross_entropy_N = per_token
        if upstream_values_N is None and upstream_cross_entropy_N is None:
            return None, None, None, None, None

        objective: _Objective = ctx.objective
        pair = _Pair(student_logits_NV, teacher_logits_NV, objective.temperature, ctx.chunk)
        gradient_NV = torch.empty_like(student_logits_NV)
        for columns, log_q_NC, log_p_NC, gap_NC in pair.chunks(log_z_q_N, log_z_p_N):
            gradient_NC = torch.zeros_like(gap_NC)
            if upstream_values_N is not None:
                q_NC = log_q_NC.exp()
                if objective.beta == 0:
                    slope_NC = q_NC - log_p_NC.exp()
                    weight = objective.weight_p
                else:
                    slope_NC = _weighted(q_NC, objective.log_q_over_other(gap_NC) - kl_q_N[:, None])
                    weight = objective.weight_q
                slope_NC *= upstream_values_N[:, None] * (weight / objective.temperature)
                # An infinite row would otherwise reach the others through the head's weight, even at
                # an upstream gradient of zero.
                gradient_NC += slope_NC.masked_fill_(~is_finite_N[:, None], 0.0)
            if upstream_cross_entropy_N is not None:
                logits_NC = student_logits_NV[:, columns].to(pair.dtype)
                slope_NC = (logits_NC - log_z_plain_N[:, None]).exp_() * upstream_cross_entropy_N[:, None]
                in_chunk_N = (labels_N >= columns.start) & (labels_N < columns.stop)
                position_N = torch.where(in_chunk_N, labels_N - columns.start, 0)
                at_label_N = torch.where(in_chunk_N, -upstream_cross_entropy_N, 0.0)
                slope_NC.scatter_add_(1, position_N[:, None], at_label_N[:, None])
                is_untrained_N = ~cross_entropy_N.isfinite() | (labels_N == IGNORE_INDEX)
                gradient_NC += slope_NC.masked_fill_(is_untrained_N[:, None], 0.0)
            gradient_NV[:, columns] = gradient_NC
        return gradient_NV, None, None, None, None


@dataclass(frozen=True)
class _Pair:
    """Both sides' logits, read chunk by chunk in the dtype of the computation."""

    student_logits_NV: Tensor
    teacher_logits_NV: Tensor
    temperature: float
    chunk: int

    @property
    def dtype(self) -> torch.dtype:
        both = torch.promote_types(self.student_logits_NV.dtype, self.teacher_logits_NV.dtype)
        return torch.promote_types(both, torch.float32)

    def chunks(self, log_z_q_N: Tensor, log_z_p_N: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield the columns of each chunk, and log q, log p and the gap there."""
        for columns in _chunks(self.student_logits_NV.shape[1], self.chunk):
            student_NC = _tempered(self.student_logits_NV[:, columns], self.temperature, self.dtype)
            teacher_NC = _tempered(self.teacher_logits_NV[:, columns], self.temperature, self.dtype)
            # Near-equal logits subtract without rounding; log q - log p would round both first.
            gap_NC = (student_NC - teacher_NC) - (log_z_q_N - log_z_p_N)[:, None]
            yield columns, student_NC - log_z_q_N[:, None], teacher_NC - log_z_p_N[:, None], gap_NC


def _scan(logits_NV: Tensor, temperature: float, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the log-normaliser and the top token of each row; -inf, and token 0, where all is -inf."""
    N, V = logits_NV.shape
    best_N = torch.full((N,), -math.inf, dtype=dtype, device=logits_NV.device)
    z_N = torch.zeros_like(best_N)
    shift_N = torch.zeros_like(best_N)
    top_N = torch.zeros((N,), dtype=torch.long, device=logits_NV.device)
    for columns in _chunks(V, chunk):
        logits_NC = _tempered(logits_NV[:, columns], temperature, dtype)
        chunk_best_N, chunk_top_N = logits_NC.max(dim=1)
        top_N = torch.where(chunk_best_N > best_N, chunk_top_N + columns.start, top_N)
        last_best_N, best_N = best_N, torch.maximum(best_N, chunk_best_N)
        # While all is -inf there is nothing to shift by: -inf - -inf would be NaN.
        shift_N = torch.where(best_N == -math.inf, 0.0, best_N)
        z_N = z_N * (last_best_N - shift_N).exp() + (logits_NC - shift_N[:, None]).exp_().sum(dim=1)
    return z_N.log() + shift_N, top_N


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor, log_z_N: Tensor) -> Tensor:
    V = logits_NV.shape[1]
    label_logits_N = logits_NV.gather(1, labels_N.clamp(0, V - 1)[:, None])[:, 0].to(log_z_N.dtype)
    return mask_cross_entropy(log_z_N - label_logits_N, labels_N, V)


def _log_over_mixture(gap_NC: Tensor, log_share: float, log_other_share: float) -> Tensor:
    """Return log(a/m) with m = share·a + other_share·b, from the gap log a - log b."""
    # From the gap, and not as log a - log m, which would lose small gaps in the rounding of log m.
    return -torch.logaddexp(gap_NC.new_full((), log_share), log_other_share - gap_NC)


def _weighted(a_NC: Tensor, log_ratio_NC: Tensor) -> Tensor:
    # Zero probability contributes nothing, whatever the ratio: 0·inf would be NaN. NaN stays NaN.
    return (a_NC * log_ratio_NC).masked_fill_(a_NC == 0, 0.0)


def _tempered(logits_NC: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits_NC = logits_NC.to(dtype)
    return logits_NC if temperature == 1 else logits_NC / temperature


def _chunks(V: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, V)) for start in range(0, V, chunk))

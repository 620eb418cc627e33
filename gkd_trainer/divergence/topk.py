"""The divergence from a teacher's top tokens, with one category for all the others.

Shapes: N tokens, R a tile of them, V vocabulary, K top tokens of the teacher, C = K + 1 categories, J picked tokens.
p = teacher, q = student, both at temperature 1; the tail is every token that is not an entry of the top k.
The categories' logits are the student's at the K ids and, for the tail, the log-sum-exp of the others: the
divergence over categories is the dense one of these, and its gradient of the tail's logit spreads over the tail's
tokens in proportion to q.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.batch import HiddenSignal, TopKSignal
from gkd_trainer.divergence.blocks import compare_in_blocks
from gkd_trainer.divergence.dense import dense_divergence
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.rows import mask_cross_entropy, tile_rows, tiles

_EXCESS_MASS = 1e-3
"""How far above one the mass of a teacher's top k may be by rounding; more is no distribution."""


def topk_divergence(
    student_logits_NV: Tensor,
    teacher: TopKSignal,
    *,
    objective: Objective,
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    token_block: int | None = None,
) -> TokenDivergence:
    """Compare a student's logits [N, V] with a teacher's top tokens, token by token.

    The arguments are those of `loss.token_divergence`, which checks them; `token_block` tokens are worked on at
    once. No tensor of N×V elements is made but the gradient of the student's logits, in their dtype.
    """
    V = student_logits_NV.shape[1]
    dtype = torch.promote_types(torch.promote_types(student_logits_NV.dtype, teacher.log_p_NK.dtype), torch.float32)
    log_p_NK = teacher.log_p_NK.detach()
    is_entry_NK = log_p_NK != -math.inf
    picked_NJ, is_inside_NJ = teacher.ids_NK.clamp(0, V - 1), is_entry_NK
    if labels_N is not None:
        picked_NJ = torch.cat([picked_NJ, labels_N.clamp(0, V - 1)[:, None]], dim=1)
        is_inside_NJ = torch.nn.functional.pad(is_entry_NK, (0, 1), value=False)
    tile = token_block or tile_rows(student_logits_NV)
    logits_NJ, log_rest_N, log_z_N, top_q_N, entropy_q_N = _Split.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, picked_NJ, is_inside_NJ, dtype, tile
    )

    mass_p_N = log_p_NK.logsumexp(dim=1).exp()
    is_outside_NK = (teacher.ids_NK < 0) | (teacher.ids_NK >= V)
    is_teacher_finite_N = is_entry_NK.any(dim=1) & ~(is_entry_NK & is_outside_NK).any(dim=1)
    is_teacher_finite_N &= mass_p_N <= 1 + _EXCESS_MASS  # False for NaN too
    is_student_finite_N = log_z_N.isfinite()

    K = is_entry_NK.shape[1]
    student_NC = logits_NJ[:, :K].masked_fill(~is_entry_NK, -math.inf)
    mass_q_N = (student_NC.detach() - log_z_N.detach()[:, None]).exp().sum(dim=1)
    teacher_NC = log_p_NK
    if tail == "bucket":
        log_tail_p_N = _log_tail(log_p_NK, is_entry_NK, V, is_rest_empty_N=log_rest_N == -math.inf)
        student_NC = torch.cat([student_NC, log_rest_N[:, None]], dim=1)
        teacher_NC = torch.cat([log_p_NK, log_tail_p_N[:, None]], dim=1)
    # What the categories don't show must show in the value: logits outside them, a mass above one.
    student_NC = student_NC.masked_fill(~is_student_finite_N[:, None], math.nan)
    teacher_NC = teacher_NC.masked_fill(~is_teacher_finite_N[:, None], math.nan)
    result = dense_divergence(student_NC, teacher_NC, objective=objective)

    cross_entropy_N = None
    if labels_N is not None:
        cross_entropy_N = mask_cross_entropy(log_z_N - logits_NJ[:, K], labels_N, V)
        cross_entropy_N = torch.where(cross_entropy_N.isfinite(), cross_entropy_N, cross_entropy_N.detach())
    top_p_N = picked_NJ.gather(1, log_p_NK.argmax(dim=1, keepdim=True))[:, 0]
    return TokenDivergence(
        values_N=result.values_N,
        cross_entropy_N=cross_entropy_N,
        student_entropy_N=entropy_q_N,
        teacher_entropy_N=result.teacher_entropy_N,
        agrees_N=(top_q_N == top_p_N) & is_teacher_finite_N & is_student_finite_N,
        is_teacher_finite_N=is_teacher_finite_N,
        is_finite_N=result.is_finite_N,
        teacher_mass_N=mass_p_N.to(dtype),
        student_mass_N=mass_q_N,
    )


def linear_topk_divergence(
    student: HiddenSignal,
    teacher: TopKSignal,
    *,
    objective: Objective,
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    token_block: int | None = None,
) -> TokenDivergence:
    """Compare a student's final hidden states with a teacher's top tokens, token by token.

    The arguments are those of `loss.token_divergence`, which checks them. Logits exist for one block of
    tokens at a time and are made again in the backward pass. Gradients reach the student's hidden states,
    weight and bias, each in its own dtype, where they require one.
    """

    def compare(
        student_logits_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, labels_N: Tensor | None
    ) -> TokenDivergence:
        block = TopKSignal(ids_NK, log_p_NK, teacher.vocab_size)
        return topk_divergence(student_logits_NV, block, objective=objective, tail=tail, labels_N=labels_N)

    return compare_in_blocks(compare, student, teacher.ids_NK, teacher.log_p_NK, labels_N, token_block=token_block)


class _Split(torch.autograd.Function):
    """Logits [N, V] split into picked ones and the log-sum-exp of those that are not inside the top k.

    All less the row's largest logit, which drops out of every softmax: log-probs of a teacher are compared with
    numbers of their own size, and not of logits that round much more coarsely. Its gradient is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, picked_NJ: Tensor, is_inside_NJ: Tensor, dtype: torch.dtype, tile: int
    ) -> tuple[Tensor, ...]:
        """Return logits_NJ at the picked ids, log_rest_N, and of all logits log_z_N, top_N and entropy_N."""
        per_tile = []
        for rows in tiles(logits_NV.shape[0], tile):
            logits_RV, top_R = _shifted(logits_NV[rows], dtype)
            log_z_R = logits_RV.logsumexp(dim=1)
            log_q_RV = logits_RV - log_z_R[:, None]
            # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
            entropy_R = -(log_q_RV.exp() * log_q_RV).masked_fill_(log_q_RV == -math.inf, 0.0).sum(dim=1)
            log_rest_R = _without(logits_RV, picked_NJ[rows], is_inside_NJ[rows]).logsumexp(dim=1)
            per_tile.append((logits_RV.gather(1, picked_NJ[rows]), log_rest_R, log_z_R, top_R, entropy_R))
        logits_NJ, log_rest_N, log_z_N, top_N, entropy_N = map(torch.cat, zip(*per_tile, strict=True))
        ctx.dtype, ctx.tile = dtype, tile
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_NV, picked_NJ, is_inside_NJ, log_rest_N, log_z_N)
        ctx.mark_non_differentiable(top_N, entropy_N)
        return logits_NJ, log_rest_N, log_z_N, top_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream_NJ, upstream_rest_N, upstream_z_N, *_ = upstream
        logits_NV, picked_NJ, is_inside_NJ, log_rest_N, log_z_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for rows in tiles(logits_NV.shape[0], ctx.tile):
            logits_RV, _ = _shifted(logits_NV[rows], ctx.dtype)
            gradient_RV = torch.zeros_like(logits_RV)
            if upstream_rest_N is not None:
                rest_RV = _without(logits_RV, picked_NJ[rows], is_inside_NJ[rows])
                gradient_RV += _spread(upstream_rest_N[rows], rest_RV, log_rest_N[rows])
            if upstream_z_N is not None:
                gradient_RV += _spread(upstream_z_N[rows], logits_RV, log_z_N[rows])
            if upstream_NJ is not None:
                gradient_RV.scatter_add_(1, picked_NJ[rows], upstream_NJ[rows])
            gradient_NV[rows] = gradient_RV
        return gradient_NV, None, None, None, None


def _shifted(logits_RV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return each row less its largest logit, in the computation's dtype, and where that stands."""
    largest = logits_RV.max(dim=1)
    return logits_RV.to(dtype) - largest.values.to(dtype)[:, None], largest.indices


def _without(logits_RV: Tensor, picked_RJ: Tensor, is_inside_RJ: Tensor) -> Tensor:
    # Added and not assigned: an id of no entry may be that of another entry too, and must leave it alone.
    return logits_RV.scatter_add(1, picked_RJ, torch.where(is_inside_RJ, -math.inf, 0.0).to(logits_RV.dtype))


def _spread(upstream_R: Tensor, logits_RV: Tensor, log_z_R: Tensor) -> Tensor:
    """Return the gradient of a log-sum-exp: upstream·softmax, and zero where it is not finite."""
    gradient_RV = (logits_RV - log_z_R[:, None]).exp_().mul_(upstream_R[:, None])
    return gradient_RV.masked_fill_(~log_z_R.isfinite()[:, None], 0.0)


def _log_tail(log_p_NK: Tensor, is_entry_NK: Tensor, V: int, *, is_rest_empty_N: Tensor) -> Tensor:
    """Return log of the teacher's mass outside its entries; -inf where there is no token outside."""
    # 1 - mass rounds to zero where the tail is small, and zero would make the reverse KL infinite.
    resolution = torch.finfo(log_p_NK.dtype).eps
    tail_p_N = -torch.expm1(log_p_NK.logsumexp(dim=1))
    log_tail_p_N = tail_p_N.clamp_min(resolution).log()
    # Of a signal sliced to the entries' tokens, the mass elsewhere is nowhere: the entries are renormalised.
    has_no_outside_N = is_entry_NK.sum(dim=1) == V
    is_empty_N = is_rest_empty_N & (tail_p_N <= resolution)
    return log_tail_p_N.masked_fill(has_no_outside_N | is_empty_N, -math.inf)

"""The divergence as the formula says it, in plain torch: what every faster path is tested against.

Shapes: N tokens, V vocabulary. p = teacher, q = student, m = beta·p + (1 - beta)·q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
) -> Tensor:
    """Return the divergence of each token in float64, differentiable to the student's logits by autograd.

    Args:
        student_logits_NV: [N, V], any float dtype; -inf is probability zero.
        teacher_logits_NV: [N, V], likewise; no gradient reaches it.
        beta: in [0, 1]; 0 is the forward KL(p‖q), 1 the reverse KL(q‖p).
        temperature: positive; both sides are softmax(logits / temperature).
        scale: "paper", or "continuous", which divides by beta·(1 - beta) inside (0, 1).

    Returns:
        values_N in nats, +inf where a KL is infinite.

    Source: Agarwal et al. 2023, arXiv 2306.13649, eq. 1.
    """
    values_NV = elementwise_jsd(
        student_logits_NV.double(), teacher_logits_NV.double(), beta=beta, temperature=temperature
    )
    values_N = values_NV.sum(dim=-1)
    if scale == "continuous" and 0 < beta < 1:
        values_N = values_N / (beta * (1 - beta))
    return values_N


def elementwise_jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float) -> Tensor:
    """Return each token's contribution to the divergence, [..., V] as the logits, in their dtype.

    The arguments are those of `reference_jsd`. Several tensors of that size are made and kept for backward.
    """
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return _weighted(p, log_p, log_q)
    if beta == 1:
        return _weighted(q, log_q, log_p)
    m = beta * p + (1 - beta) * q
    # Where m is 0 so are p and q, and the terms are zero: the 1 only keeps log's gradient finite.
    log_m = torch.where(m == 0, 1.0, m).log()
    return beta * _weighted(p, log_p, log_m) + (1 - beta) * _weighted(q, log_q, log_m)


def _weighted(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    # The ratio is masked before it is multiplied, because 0·inf is NaN in the gradient even if masked later.
    return a * torch.where(a == 0, 0.0, log_a - log_b)

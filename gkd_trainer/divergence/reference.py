"""The divergence as the formula says it, in plain torch: what every faster path is tested against.

Shapes: N tokens, V vocabulary, K top tokens of a teacher. p = teacher, q = student, m = beta·p + (1 - beta)·q.
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


def reference_topk_jsd(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    *,
    beta: float,
    scale: str = "paper",
    tail: str = "bucket",
) -> Tensor:
    """Return the divergence of each token over the teacher's K tokens and the tail, in float64, by autograd.

    Args:
        student_logits_NV: [N, V], any float dtype.
        ids_NK: [N, K] token ids, distinct in a row where `log_p_NK` is not -inf.
        log_p_NK: [N, K] the teacher's log-probs; -inf is no entry.
        beta: as for `reference_jsd`.
        scale: likewise.
        tail: "bucket" makes one category of all tokens that are no entry, "renormalize" leaves them out.

    Returns:
        values_N in nats.
    """
    N, V = student_logits_NV.shape
    is_entry_NK = log_p_NK != -torch.inf
    # A further column takes what is no entry, whatever its id.
    column_NK = torch.where(is_entry_NK, ids_NK, V)
    p_NV = torch.zeros(N, V + 1, dtype=torch.float64).scatter(1, column_NK, log_p_NK.double().exp())[:, :V]
    is_inside_NV = torch.zeros(N, V + 1, dtype=torch.bool).scatter(1, column_NK, True)[:, :V]
    q_NV = student_logits_NV.double().softmax(dim=1)
    p_parts, q_parts = [p_NV], [q_NV * is_inside_NV]
    if tail == "bucket":
        # No teacher's mass is known better than to the rounding of its log-probs.
        tail_p_N1 = (1 - p_NV.sum(dim=1, keepdim=True)).clamp_min(torch.finfo(log_p_NK.dtype).eps)
        p_parts.append(torch.where(is_inside_NV.all(dim=1, keepdim=True), 0.0, tail_p_N1))
        q_parts.append((q_NV * ~is_inside_NV).sum(dim=1, keepdim=True))
    p_NC, q_NC = torch.cat(p_parts, dim=1), torch.cat(q_parts, dim=1)
    p_NC, q_NC = p_NC / p_NC.sum(dim=1, keepdim=True), q_NC / q_NC.sum(dim=1, keepdim=True)
    if beta == 0:
        return _kl(p_NC, q_NC)
    if beta == 1:
        return _kl(q_NC, p_NC)
    m_NC = beta * p_NC + (1 - beta) * q_NC
    values_N = beta * _kl(p_NC, m_NC) + (1 - beta) * _kl(q_NC, m_NC)
    return values_N / (beta * (1 - beta)) if scale == "continuous" else values_N


def reference_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    divergence: str,
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.7,
    mu: float = 0.5,
) -> Tensor:
    """Return another divergence than the JSD of each token, in float64, by autograd.

    Args:
        student_logits_NV: [N, V], any float dtype.
        teacher_logits_NV: [N, V], likewise; no gradient reaches it.
        divergence: "skew_kl", KL(p‖alpha·p + (1 - alpha)·q), and "skew_reverse_kl", KL(q‖(1 - alpha)·p + alpha·q)
            (Ko et al. 2024, arXiv 2402.03898); "total_variation", Σ|p - q| / 2; "alpha_beta", Σ(alpha·p^(alpha + beta)
            / (alpha + beta) + beta·q^(alpha + beta) / (alpha + beta) - p^alpha·q^beta) / (alpha·beta) (Wang et al.
            2025, arXiv 2505.04560); "adaptive_kl", w·KL(p‖q) + (1 - w)·KL(q‖p) with w the head's share of Σ|p - q|, a
            constant to the gradient, where the head are p's most probable tokens with a mass of at most mu, or the
            first (Wu et al. 2024, arXiv 2404.02657).
        temperature: positive; both sides are softmax(logits / temperature).
        alpha: as above.
        beta: as above.
        mu: as above.

    Returns:
        values_N.
    """
    q_NV = (student_logits_NV.double() / temperature).softmax(dim=1)
    p_NV = (teacher_logits_NV.detach().double() / temperature).softmax(dim=1)
    if divergence == "skew_kl":
        return _kl(p_NV, alpha * p_NV + (1 - alpha) * q_NV)
    if divergence == "skew_reverse_kl":
        return _kl(q_NV, (1 - alpha) * p_NV + alpha * q_NV)
    if divergence == "total_variation":
        return (p_NV - q_NV).abs().sum(dim=1) / 2
    if divergence == "alpha_beta":
        powers_NV = (alpha * p_NV ** (alpha + beta) + beta * q_NV ** (alpha + beta)) / (alpha + beta)
        return (powers_NV - p_NV**alpha * q_NV**beta).sum(dim=1) / (alpha * beta)
    gap_NV = (p_NV - q_NV.detach()).abs()
    weights = []
    for p_V, gap_V in zip(p_NV, gap_NV, strict=True):
        order = p_V.argsort(descending=True)
        head = order[: max(1, int((p_V[order].cumsum(0) <= mu).sum()))]
        weights.append(gap_V[head].sum() / gap_V.sum() if gap_V.sum() > 0 else gap_V.new_tensor(0.5))
    weight_N = torch.stack(weights)
    return weight_N * _kl(p_NV, q_NV) + (1 - weight_N) * _kl(q_NV, p_NV)


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


def _kl(a_NC: Tensor, b_NC: Tensor) -> Tensor:
    """Return KL(a‖b) of probabilities; categories that a gives none contribute nothing."""
    is_absent_NC = a_NC == 0
    log_ratio_NC = torch.where(is_absent_NC, 1.0, a_NC).log() - torch.where(is_absent_NC, 1.0, b_NC).log()
    return (a_NC * log_ratio_NC).sum(dim=1)

"""The divergences as their papers write them: the oracles of the float64 reference.

Shapes: N tokens, V vocabulary. p = teacher, q = student, both probabilities [N, V]. Each function returns values_N,
and autograd gives the gradient. The terms in `objective.py` are tested against these, and share no code with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Oracle = Callable[[Tensor, Tensor, Mapping[str, float]], Tensor]
"""Returns values_N of p_NV, q_NV and the formula's parameters by name."""


def jsd(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return beta·KL(p‖m) + (1 - beta)·KL(q‖m) with m = beta·p + (1 - beta)·q; at the ends the two KLs."""
    beta = parameters["beta"]
    if beta == 0:
        return kl(p_NV, q_NV)
    if beta == 1:
        return kl(q_NV, p_NV)
    m_NV = beta * p_NV + (1 - beta) * q_NV
    return beta * kl(p_NV, m_NV) + (1 - beta) * kl(q_NV, m_NV)


def skew_kl(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return KL(p‖alpha·p + (1 - alpha)·q)."""
    alpha = parameters["alpha"]
    return kl(p_NV, alpha * p_NV + (1 - alpha) * q_NV)


def skew_reverse_kl(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return KL(q‖(1 - alpha)·p + alpha·q)."""
    alpha = parameters["alpha"]
    return kl(q_NV, (1 - alpha) * p_NV + alpha * q_NV)


def total_variation(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return Σ|p - q| / 2."""
    return (p_NV - q_NV).abs().sum(dim=1) / 2


def alpha_beta(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return Σ((alpha·p^s + beta·q^s) / s - p^alpha·q^beta) / (alpha·beta) with s = alpha + beta.

    The division multiplies what float64 rounds: an alpha·beta below some 1e-9 leaves noise.
    """
    alpha, beta = parameters["alpha"], parameters["beta"]
    powers_NV = (alpha * p_NV ** (alpha + beta) + beta * q_NV ** (alpha + beta)) / (alpha + beta)
    return (powers_NV - p_NV**alpha * q_NV**beta).sum(dim=1) / (alpha * beta)


def adaptive_kl(p_NV: Tensor, q_NV: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Return w·KL(p‖q) + (1 - w)·KL(q‖p), with w the head's share of Σ|p - q|, a constant to the gradient.

    The head is p's most probable tokens with a mass of at most mu, or the first one.
    """
    gap_NV = (p_NV - q_NV.detach()).abs()
    weights = []
    for p_V, gap_V in zip(p_NV, gap_NV, strict=True):
        order = p_V.argsort(descending=True)
        head = order[: max(1, int((p_V[order].cumsum(0) <= parameters["mu"]).sum()))]
        weights.append(gap_V[head].sum() / gap_V.sum() if gap_V.sum() > 0 else gap_V.new_tensor(0.5))
    weight_N = torch.stack(weights)
    return weight_N * kl(p_NV, q_NV) + (1 - weight_N) * kl(q_NV, p_NV)


def kl(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """Return KL(a‖b) of probabilities; a token of probability zero under a contributes nothing."""
    is_absent_NV = a_NV == 0
    log_ratio_NV = torch.where(is_absent_NV, 1.0, a_NV).log() - torch.where(is_absent_NV, 1.0, b_NV).log()
    return (a_NV * log_ratio_NV).sum(dim=1)

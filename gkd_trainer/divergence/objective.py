"""What is minimised at each token, term by term, for every path that computes it.

Shapes: R rows (tokens worked on at once), V vocabulary.
p = teacher, q = student, both softmax(logits / temperature), gap = log q - log p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 1e4
"""A gap that stands for infinity where the probability before it is zero: 0·inf would be NaN."""


class Pair(NamedTuple):
    """Both distributions over the vocabulary, [R, V] each."""

    q: Tensor
    p: Tensor
    log_q: Tensor
    log_p: Tensor
    gap: Tensor


OPTIONS: dict[str, dict[str, float]] = {
    "jsd": {},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "adaptive_kl": {"mu": 0.5},
}
"""The divergences, each with its options and their defaults; see `reference.reference_divergence` for the formulas."""


@dataclass(frozen=True)
class Objective:
    """A divergence with its options and the temperature at which it compares.

    `beta` and `is_continuous` are of "jsd"; `options` are the values of the others' options, in the order of OPTIONS.
    """

    divergence: str = "jsd"
    beta: float = 0.5
    options: tuple[float, ...] = ()
    temperature: float = 1.0
    is_continuous: bool = False

    @property
    def kind(self) -> str:
        """The name of the formula, a key of TERMS: the ends of beta have one of their own."""
        if self.divergence != "jsd" or 0 < self.beta < 1:
            return self.divergence
        return "forward_kl" if self.beta == 0 else "reverse_kl"

    def numbers(self, softcap: float | None) -> tuple[float, ...]:
        """Return what rows are compared with: 1 / temperature, 1 / softcap (0 for none), factor, and two options."""
        factor = 1 / (self.beta * (1 - self.beta)) if self.is_continuous and self.kind == "jsd" else 1.0
        options = (self.beta,) if self.divergence == "jsd" else self.options
        first, second = (*options, 0.0, 0.0)[:2]
        return 1 / self.temperature, 0.0 if softcap is None else 1 / softcap, factor, first, second


# Each function returns two tensors [R, V]: the terms of the value, and the slope q·∂value/∂q, which gives the
# gradient of the logits as slope - q·Σ slope (any multiple of q may be added to it: so log(q/p) stands for
# log(q/p) + 1). Both are finite, or what the value is, where a probability is zero.


def _forward_kl(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return -pair.p * pair.gap.clamp(max=_FAR), pair.q - pair.p


def _reverse_kl(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    terms_RV = pair.q * pair.gap.clamp(min=-_FAR)
    return terms_RV, terms_RV


def _jsd(pair: Pair, beta: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Agarwal et al. 2023, arXiv 2306.13649, eq. 1: beta·KL(p‖m) + (1 - beta)·KL(q‖m)."""
    log_q_over_m, log_p_over_m = _log_over_mixture(pair.gap, beta)
    slope_RV = (1 - beta) * pair.q * log_q_over_m
    return slope_RV + beta * pair.p * log_p_over_m, slope_RV


def _skew_kl(pair: Pair, alpha: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Ko et al. 2024, arXiv 2402.03898: KL(p‖m), m = alpha·p + (1 - alpha)·q."""
    _, log_p_over_m = _log_over_mixture(pair.gap, alpha)
    return pair.p * log_p_over_m, (alpha - 1) * pair.q * torch.expm1(log_p_over_m)


def _skew_reverse_kl(pair: Pair, alpha: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Ko et al. 2024, arXiv 2402.03898: KL(q‖m), m = (1 - alpha)·p + alpha·q."""
    log_q_over_m, _ = _log_over_mixture(pair.gap, 1 - alpha)
    return pair.q * log_q_over_m, pair.q * (log_q_over_m - alpha * torch.expm1(log_q_over_m))


def _total_variation(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * (pair.q - pair.p).abs(), 0.5 * pair.q * pair.gap.sign()


def _alpha_beta(pair: Pair, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Wang et al. 2025, arXiv 2505.04560; alpha and beta are positive."""
    total = alpha + beta
    cross_RV = (alpha * pair.log_p + beta * pair.log_q).exp()
    p_power_RV, q_power_RV = (total * pair.log_p).exp(), (total * pair.log_q).exp()
    value_RV = (p_power_RV * alpha + q_power_RV * beta) / total - cross_RV
    return value_RV / (alpha * beta), (q_power_RV - cross_RV) / alpha


def _adaptive_kl(pair: Pair, mu: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Wu et al. 2024, arXiv 2404.02657: KL(p‖q) and KL(q‖p), weighted by the gaps in the head and the tail of p.

    The head are the most probable tokens whose probabilities add up to `mu` at most, the first one in any case.
    The weights count as constants, as in the authors' code.
    """
    sorted_RV = pair.p.sort(dim=1, descending=True).values
    head_size_R1 = (sorted_RV.cumsum(dim=1) <= mu).sum(dim=1, keepdim=True).clamp_min(1)
    is_head_RV = pair.p >= sorted_RV.gather(1, head_size_R1 - 1)
    distance_RV = (pair.q - pair.p).abs()
    head_R1 = torch.where(is_head_RV, distance_RV, 0.0).sum(dim=1, keepdim=True)
    all_R1 = distance_RV.sum(dim=1, keepdim=True)
    # Equal distributions have no gap to share out: 0/0.
    weight_R1 = torch.where(all_R1 == 0, 0.5, head_R1 / all_R1)
    forward, reverse = _forward_kl(pair, mu, second), _reverse_kl(pair, mu, second)
    return (
        weight_R1 * forward[0] + (1 - weight_R1) * reverse[0],
        weight_R1 * forward[1] + (1 - weight_R1) * reverse[1],
    )


TERMS: dict[str, Callable[[Pair, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha_beta": _alpha_beta,
    "adaptive_kl": _adaptive_kl,
}
"""The terms of each formula, from a pair and two options."""


def _log_over_mixture(gap_RV: Tensor, share_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(q/m) and log(p/m) with m = share_p·p + (1 - share_p)·q; finite everywhere."""
    # From the gap, and not as log q - log m, which would lose small gaps in the rounding of log m, as log and exp
    # in place of log1p and expm1 would lose small shares.
    # The largest gap whose exponential is finite: beyond it the smaller probability is zero. Not from a table, whose
    # numbers the compiler would take for variables at first, and then start over.
    limit = 80.0 if gap_RV.dtype == torch.float32 else 700.0
    gap_RV = gap_RV.clamp(-limit, limit)
    log_q_over_m = -torch.log1p(share_p * torch.expm1(-gap_RV))
    return log_q_over_m, log_q_over_m - gap_RV

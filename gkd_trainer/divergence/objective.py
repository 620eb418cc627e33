"""The divergences: for each, the terms to minimise at a token, its options, its oracle and its documentation.

A new divergence is one entry of `DIVERGENCES`: its terms below, and its oracle in `formulas.py`, written independently.
Its options, the choices of the configuration, the errors, the reference and the tests follow from the entry;
docs/divergence.md must list it. Eager and compiled code use the terms directly; the Triton kernel has its own
(`triton.KINDS`), and a divergence that it lacks runs in plain torch on a GPU.

Shapes: R rows of logits (tokens compared at once), V vocabulary.
p = teacher, q = student, both softmax(logits / temperature), gap = log q - log p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gkd_trainer.divergence import formulas

_FAR = 1e4
"""A gap that stands for infinity when multiplied by probability zero: 0·inf would be NaN."""


class Pair(NamedTuple):
    """Both distributions over the vocabulary, [R, V] each."""

    q: Tensor
    p: Tensor
    log_q: Tensor
    log_p: Tensor
    gap: Tensor


Terms = Callable[[Pair, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns, for a pair and two numbers, the terms [R, V] of the value, and its slope q·∂value/∂q.

The gradient of the logits is slope - q·Σ slope; any multiple of q may be added to the slope, so log(q/p) may stand for
log(q/p) + 1. Where a probability is zero, both are finite, or as infinite as the value.
"""


@dataclass(frozen=True)
class Option:
    """A positive number in a divergence's formula: its default, and its upper bound, which is excluded."""

    default: float
    below: float = 1.0


@dataclass(frozen=True)
class Divergence:
    """A divergence of q from p.

    Attributes:
        formula: the value of a token, for the documentation; m is a mixture of p and q.
        source: the paper, as a Markdown link, or an empty string.
        terms: the formula as computed by the loss.
        oracle: the formula that the loss is tested against.
        options: up to two numbers of the formula that users can choose, in the order of `terms`' arguments.
        is_in_nats: whether the value is in nats; otherwise it has no unit.
    """

    formula: str
    source: str
    terms: Terms
    oracle: formulas.Oracle
    options: Mapping[str, Option] = field(default_factory=dict)
    is_in_nats: bool = True

    def __post_init__(self) -> None:
        """Refuse a third option: the compiled code and the kernel take two."""
        assert len(self.options) <= 2


@dataclass(frozen=True)
class Objective:
    """A divergence with its numbers and temperature.

    `beta` and `is_continuous` (divided by beta·(1 - beta)) are for "jsd"; `options` are the values of the other
    divergences' options, in the order of the entry. `options.checked_objective` builds one from a caller's arguments.
    """

    divergence: str = "jsd"
    beta: float = 0.5
    options: tuple[float, ...] = ()
    temperature: float = 1.0
    is_continuous: bool = False

    @property
    def kind(self) -> str:
        """The key of its terms in TERMS: the ends of beta have their own."""
        if self.divergence != "jsd" or 0 < self.beta < 1:
            return self.divergence
        return "forward_kl" if self.beta == 0 else "reverse_kl"

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers of the formula by name."""
        if self.divergence == "jsd":
            return {"beta": self.beta}
        return dict(zip(DIVERGENCES[self.divergence].options, self.options, strict=True))

    def numbers(self, softcap: float | None) -> tuple[float, ...]:
        """Return the numbers of a comparison: 1 / temperature, 1 / softcap (0 for none), factor, two parameters.

        If the formula has one parameter, a share, the second is its complement: in float32, 1 - share rounds too much.
        """
        factor = 1 / (self.beta * (1 - self.beta)) if self.is_continuous and self.kind == "jsd" else 1.0
        first, *others = self.parameters.values() or (0.0,)
        second = others[0] if others else 1 - first
        return 1 / self.temperature, 0.0 if softcap is None else 1 / softcap, factor, first, second


def _forward_kl(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return -pair.p * pair.gap.clamp(max=_FAR), pair.q - pair.p


def _reverse_kl(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    terms_RV = pair.q * pair.gap.clamp(min=-_FAR)
    return terms_RV, terms_RV


def _jsd(pair: Pair, beta: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Agarwal et al. 2023, arXiv 2306.13649, eq. 1: beta·KL(p‖m) + (1 - beta)·KL(q‖m); rest = 1 - beta."""
    log_q_over_m, log_p_over_m = _log_over_mixture(pair.gap, beta, rest)
    slope_RV = rest * pair.q * log_q_over_m
    return slope_RV + beta * pair.p * log_p_over_m, slope_RV


def _skew_kl(pair: Pair, alpha: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Ko et al. 2024, arXiv 2402.03898: KL(p‖m), m = alpha·p + (1 - alpha)·q; rest = 1 - alpha."""
    _, log_p_over_m = _log_over_mixture(pair.gap, alpha, rest)
    return pair.p * log_p_over_m, -rest * pair.q * _expm1(log_p_over_m)


def _skew_reverse_kl(pair: Pair, alpha: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Ko et al. 2024, arXiv 2402.03898: KL(q‖m), m = (1 - alpha)·p + alpha·q; rest = 1 - alpha."""
    log_q_over_m, _ = _log_over_mixture(pair.gap, rest, alpha)
    return pair.q * log_q_over_m, pair.q * (log_q_over_m - alpha * _expm1(log_q_over_m))


def _total_variation(pair: Pair, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * (pair.q - pair.p).abs(), 0.5 * pair.q * pair.gap.sign()


def _alpha_beta(pair: Pair, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Wang et al. 2025, arXiv 2505.04560; alpha and beta are positive.

    A term is max(p, q)^s / s · ((1 - e^(-a·g)) / a - e^(-a·g)·(1 - e^(-b·g)) / b): with s = alpha + beta, g = |gap|,
    and (a, b) = (alpha, beta) where q is the larger, (beta, alpha) where p is.
    """
    # The paper's difference of near-equal powers, divided by alpha·beta, would be noise for a small alpha or beta.
    total = alpha + beta
    is_q_larger_RV, size_RV = pair.gap > 0, pair.gap.abs()
    a_RV, b_RV = torch.where(is_q_larger_RV, alpha, beta), torch.where(is_q_larger_RV, beta, alpha)
    power_RV = (total * torch.maximum(pair.log_q, pair.log_p)).exp()
    cross_RV = power_RV * (-a_RV * size_RV).exp()  # p^alpha·q^beta
    rise_RV = power_RV * _expm1(-a_RV * size_RV) / -a_RV
    fall_RV = cross_RV * _expm1(-b_RV * size_RV) / -b_RV
    return (rise_RV - fall_RV) / total, torch.where(is_q_larger_RV, rise_RV, -fall_RV)


def _adaptive_kl(pair: Pair, mu: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Wu et al. 2024, arXiv 2404.02657: KL(p‖q) and KL(q‖p), weighted by the gaps in the head and the tail of p.

    The head is the most probable tokens whose probabilities add up to at most `mu`, and at least the first one.
    The weights count as constants, as in the authors' code.
    """
    sorted_RV = pair.p.sort(dim=1, descending=True).values
    head_size_R1 = (sorted_RV.cumsum(dim=1) <= mu).sum(dim=1, keepdim=True).clamp_min(1)
    is_head_RV = pair.p >= sorted_RV.gather(1, head_size_R1 - 1)
    distance_RV = (pair.q - pair.p).abs()
    head_R1 = torch.where(is_head_RV, distance_RV, 0.0).sum(dim=1, keepdim=True)
    all_R1 = distance_RV.sum(dim=1, keepdim=True)
    # Equal distributions have no distance to divide by: 0/0.
    weight_R1 = torch.where(all_R1 == 0, 0.5, head_R1 / all_R1)
    forward, reverse = _forward_kl(pair, mu, second), _reverse_kl(pair, mu, second)
    return (
        weight_R1 * forward[0] + (1 - weight_R1) * reverse[0],
        weight_R1 * forward[1] + (1 - weight_R1) * reverse[1],
    )


def _expm1(x_RV: Tensor) -> Tensor:
    """Return exp(x) - 1, right in proportion near zero also in compiled code, where torch.expm1 is exp(x) - 1."""
    tanh_RV = torch.tanh(x_RV / 2)
    return 2 * tanh_RV / (1 + tanh_RV.abs()) * x_RV.clamp(min=0).exp()


def _log_over_mixture(gap_RV: Tensor, share_p: Tensor, share_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(q/m) and log(p/m) with m = share_p·p + share_q·q, shares that add up to 1; finite everywhere.

    That of the larger share is small, if the other share is, and right in proportion.
    """
    # Computed from the gap, since log q - log m would lose small gaps in the rounding of log m; with log1p and expm1,
    # since log and exp would lose small shares; from the smaller share, since the gap would absorb what it changes.
    # The largest gap with a finite exponential: beyond it the smaller probability is zero. Literal numbers, since the
    # compiler would at first take numbers from a table for variables, and then compile again.
    limit = 80.0 if gap_RV.dtype == torch.float32 else 700.0
    is_mostly_p = (share_p > share_q).to(gap_RV.dtype)
    # The logarithm of the side of the smaller share over the other.
    log_less_over_more = gap_RV.clamp(-limit, limit) * (2 * is_mostly_p - 1)
    log_more_over_m = -torch.log1p(torch.minimum(share_p, share_q) * torch.expm1(log_less_over_more))
    # One of them is that of the smaller share; chosen by factors of 0 and 1, since the shares are tensors.
    log_q_over_m = torch.addcmul(log_more_over_m, is_mostly_p, log_less_over_more)
    return log_q_over_m, torch.addcmul(log_more_over_m, 1 - is_mostly_p, log_less_over_more)


DIVERGENCES: dict[str, Divergence] = {
    "jsd": Divergence(
        formula="β·KL(p‖m) + (1 − β)·KL(q‖m), m = β·p + (1 − β)·q; at β = 0 KL(p‖q), at β = 1 KL(q‖p)",
        source="[Agarwal et al. 2023](https://arxiv.org/abs/2306.13649), eq. 1",
        terms=_jsd,
        oracle=formulas.jsd,
    ),
    "skew_kl": Divergence(
        formula="KL(p‖m), m = alpha·p + (1 − alpha)·q",
        source="[Ko et al. 2024](https://arxiv.org/abs/2402.03898)",
        terms=_skew_kl,
        oracle=formulas.skew_kl,
        options={"alpha": Option(0.1)},
    ),
    "skew_reverse_kl": Divergence(
        formula="KL(q‖m), m = (1 − alpha)·p + alpha·q",
        source="[Ko et al. 2024](https://arxiv.org/abs/2402.03898)",
        terms=_skew_reverse_kl,
        oracle=formulas.skew_reverse_kl,
        options={"alpha": Option(0.1)},
    ),
    "total_variation": Divergence(
        formula="Σ abs(p − q) / 2",
        source="",
        terms=_total_variation,
        oracle=formulas.total_variation,
        is_in_nats=False,
    ),
    "alpha_beta": Divergence(
        formula="Σ ((alpha·pˢ + beta·qˢ) / s − p^alpha·q^beta) / (alpha·beta), s = alpha + beta",
        source="[Wang et al. 2025](https://arxiv.org/abs/2505.04560)",
        terms=_alpha_beta,
        oracle=formulas.alpha_beta,
        options={"alpha": Option(0.2, below=math.inf), "beta": Option(0.7, below=math.inf)},
        is_in_nats=False,
    ),
    "adaptive_kl": Divergence(
        formula="w·KL(p‖q) + (1 − w)·KL(q‖p), w = the share of Σ abs(p − q) on p's top tokens up to mass mu",
        source="[Wu et al. 2024](https://arxiv.org/abs/2404.02657)",
        terms=_adaptive_kl,
        oracle=formulas.adaptive_kl,
        options={"mu": Option(0.5)},
    ),
}
"""The divergences by name."""

TERMS: dict[str, Terms] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    **{name: divergence.terms for name, divergence in DIVERGENCES.items()},
}
"""The terms of each `Objective.kind`."""

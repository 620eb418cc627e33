"""The oracles agree with values computed by hand from the papers' formulas."""

from math import log

import pytest
import torch

from gkd_trainer.divergence import formulas
from gkd_trainer.divergence.objective import DIVERGENCES

P = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
KL = 0.5 * log(2) - 0.25 * log(2)
"""KL(p‖q) and KL(q‖p), which are equal here."""


def by_hand_kl(a, b):
    return sum(x * log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("jsd", {"beta": 0}, KL),
        ("jsd", {"beta": 1}, KL),
        ("jsd", {"beta": 0.5}, by_hand_kl([0.5, 0.25, 0.25], [0.375, 0.375, 0.25])),  # both halves are equal
        ("skew_kl", {"alpha": 0.5}, by_hand_kl([0.5, 0.25, 0.25], [0.375, 0.375, 0.25])),
        ("skew_reverse_kl", {"alpha": 0.5}, by_hand_kl([0.25, 0.5, 0.25], [0.375, 0.375, 0.25])),
        ("total_variation", {}, 0.25),
        ("alpha_beta", {"alpha": 1.0, "beta": 1.0}, 0.0625),  # half of the squared distance, 0.125
        ("adaptive_kl", {"mu": 0.5}, KL),  # any weights of two equal KLs
    ],
)
def test_a_formula_gives_what_its_paper_says(name, parameters, expected):
    value_N = getattr(formulas, name)(P, Q, parameters)
    assert value_N.shape == (1,)
    assert value_N.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_an_oracle_that_is_zero_for_equal_distributions(name):
    parameters = {"beta": 0.3, "alpha": 0.4, "mu": 0.5}
    assert getattr(formulas, name)(P, P.clone(), parameters).item() == pytest.approx(0.0, abs=1e-12)


def test_a_category_without_probability_contributes_nothing_and_keeps_the_gradient_finite():
    q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    value_N = formulas.kl(p, q)
    assert value_N.item() == pytest.approx(log(2))
    value_N.sum().backward()
    assert q.grad.isfinite().all()

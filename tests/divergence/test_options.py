"""Options that the loss refuses, in a call and in a configuration. Shapes: N tokens, V vocabulary."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from gkd_trainer.config import GKDArguments
from gkd_trainer.divergence import reference_divergence, token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.divergence.options import SCALES, TAILS, check_top_k_temperature, checked_objective, unit_of
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import MODES, LogitsSignal, TopKSignal

N, V = 3, 7


def signal(seed=0):
    return LogitsSignal(torch.randn(N, V, generator=torch.Generator().manual_seed(seed)))


def by_call(divergence, options):
    token_divergence(signal(), signal(1), divergence=divergence, divergence_options=options)


def by_configuration(divergence, options):
    GKDArguments(divergence=divergence, divergence_options=options)


def by_the_reference(divergence, options):
    reference_divergence(signal().logits_NV, signal(1).logits_NV, divergence=divergence, **options or {})


@pytest.mark.parametrize("ask", [by_call, by_configuration, by_the_reference])
@pytest.mark.parametrize(
    ("divergence", "options", "message"),
    [
        ("kl", None, r"divergence must be one of 'jsd', 'skew_kl'.*got '?kl"),
        ("jsd", {"alpha": 0.1}, r"the divergence 'jsd' has the options \[\]; got \['alpha'\]"),
        ("skew_kl", {"alpha": 0.0}, r"'alpha' of the divergence 'skew_kl' must be in \(0, 1\).*got 0.0"),
        ("adaptive_kl", {"mu": 1.5}, r"'mu' of the divergence 'adaptive_kl' must be in \(0, 1\).*got 1.5"),
        ("alpha_beta", {"beta": -0.5}, r"'beta' of the divergence 'alpha_beta' must be in \(0, inf\).*got -0.5"),
        ("skew_kl", {"alpha": math.nan}, r"'alpha' .* must be in \(0, 1\) \(0.1 by default\); got nan"),
        ("alpha_beta", {"alpha": math.inf}, r"'alpha' .* must be in \(0, inf\).*got inf"),
        ("alpha_beta", {"alpha": 10**400}, r"'alpha' .* must be in \(0, inf\)"),
        ("alpha_beta", {"alpha": 1e-30}, r"'alpha' .* must be from 1e-12 to 1e\+12.*got 1e-30"),
        ("alpha_beta", {"alpha": 1e30}, r"'alpha' .* must be from 1e-12 to 1e\+12.*got 1e\+30"),
        ("skew_kl", {"alpha": 1e-320}, r"'alpha' .* must be from .*, or the loss would not be finite"),
        ("skew_kl", {"alpha": True}, "'alpha' .* must be a number; got True"),
        ("skew_kl", {"alpha": "0.1"}, "'alpha' .* must be a number; got '0.1'"),
        ("skew_kl", {"alpha": [0.1]}, "'alpha' .* must be a number; got"),
        ("skew_kl", {"alpha": np.array([0.1, 0.2])}, "'alpha' .* must be a number; got"),
    ],
)
def test_what_a_divergence_does_not_take_is_refused(ask, divergence, options, message):
    with pytest.raises(GKDConfigError, match=message):
        ask(divergence, options)


@pytest.mark.parametrize("ask", [by_call, by_configuration])
def test_a_sum_of_alpha_and_beta_at_which_rounding_would_be_larger_than_the_value_is_refused(ask):
    with pytest.raises(GKDConfigError, match=r"'alpha' and 'beta' .* must add up to at least 0.00012.*got 1e-06 and"):
        ask("alpha_beta", {"alpha": 1e-6, "beta": 1e-5})
    ask("alpha_beta", {"alpha": 1e-6, "beta": 1e-3})


@pytest.mark.parametrize("ask", [by_call, by_configuration])
@pytest.mark.parametrize("options", [{1: 0.5}, {None: 0.5}, {("alpha",): 0.5}])
def test_a_name_that_is_no_string_is_refused(ask, options):
    with pytest.raises(GKDConfigError, match=re.escape(f"has the options ['alpha']; got {list(options)}")):
        ask("skew_kl", options)


@pytest.mark.parametrize("options", ['{"alpha": 0.5}', [("alpha", 0.5)], 0.5, 0, ""])
def test_options_that_are_no_dictionary_are_refused_also_once_a_configuration_is_made(options):
    with pytest.raises(GKDConfigError, match=r"must be a dictionary of names and numbers; got"):
        by_call("skew_kl", options)


@pytest.mark.parametrize("divergence", [["jsd"], None, 1])
def test_a_divergence_that_is_no_name_is_refused(divergence):
    with pytest.raises(GKDConfigError, match="divergence must be one of 'jsd'"):
        by_call(divergence, None)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_other_types_count_as_floats(number):
    objective = checked_objective("skew_kl", {"alpha": number}, beta=number, temperature=number)
    assert objective.options == (0.25,)
    assert {type(each) for each in objective.numbers(None)} == {float}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_temperature": 1e-40}, "^loss_temperature must be from 1e-12 to 1e.12, since.*got 1e-40"),
        ({"loss_temperature": 1e40}, "^loss_temperature must be from 1e-12 to 1e.12, since.*got 1e.40"),
        (
            {"beta": 1e-300, "divergence_scale": "continuous"},
            "beta must be 0, 1 or at least 1.2e-07 from both; got 1e-300",
        ),
        ({"beta": 1 - 1e-9}, "beta must be 0, 1 or at least 1.2e-07 from both; got 0.99"),
    ],
)
def test_numbers_that_would_make_nan_of_the_loss_are_refused_in_a_configuration(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**options)


@pytest.mark.parametrize("end", ["lowest", "highest"])
@pytest.mark.parametrize("temperature", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_allowed_extremes_give_finite_numbers(divergence, end, temperature):
    eps = torch.finfo(torch.float32).eps
    share, size = (eps, 1000 * eps) if end == "lowest" else (1 - eps, 1e12)
    student_logits_NV = (30 * signal().logits_NV).requires_grad_()
    result = token_divergence(
        LogitsSignal(student_logits_NV),
        LogitsSignal(30 * signal(1).logits_NV),
        divergence=divergence,
        divergence_options={
            name: share if option.below == 1 else size for name, option in DIVERGENCES[divergence].options.items()
        },
        beta=share,
        temperature=temperature,
        scale="continuous",
    )
    (gradient_NV,) = torch.autograd.grad(result.values_N.sum(), student_logits_NV)
    assert result.values_N.isfinite().all()
    assert gradient_NV.isfinite().all()


def test_choices_of_the_configuration_are_those_of_the_loss():
    choices = {
        name: field.metadata["choices"]
        for name, field in GKDArguments.__dataclass_fields__.items()
        if "choices" in field.metadata
    }
    assert choices["divergence"] == list(DIVERGENCES)
    assert choices["divergence_scale"] == list(SCALES)
    assert choices["teacher_tail"] == list(TAILS)


def test_top_tokens_are_compared_at_temperature_one_only():
    check_top_k_temperature(1.0)
    with pytest.raises(GKDConfigError, match=r"loss_temperature=2\.0 can't .*Set loss_temperature to 1"):
        check_top_k_temperature(2.0, "loss_temperature")
    teacher = TopKSignal(torch.zeros(N, 1, dtype=torch.long), torch.zeros(N, 1), V)
    with pytest.raises(GKDConfigError, match=r"^temperature=2\.0 can't be applied to a teacher's top tokens"):
        token_divergence(signal(), teacher, temperature=2.0)


def test_kls_and_their_mixtures_are_in_nats_and_other_values_have_no_unit():
    in_nats = {"jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl"}
    assert {name for name in DIVERGENCES if unit_of(name) == "nats"} == in_nats
    assert {name for name in DIVERGENCES if unit_of(name) == ""} == DIVERGENCES.keys() - in_nats
    assert [mode for mode in MODES if unit_of("jsd", [mode]) == "nats"] == ["matched", "next_byte"]
    assert unit_of("jsd", ["matched", "uld"]) == ""

"""The divergences besides the JSD against the float64 oracle, and their options. Shapes: N tokens, V vocabulary."""

import ast
import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from gkd_trainer.divergence import formulas, objective, reference_divergence, reference_jsd, rows, token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES, TERMS
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal, TopKSignal

N, V = 6, 97

NAMES = sorted(DIVERGENCES.keys() - {"jsd"})
CASES = [
    *((name, {}) for name in NAMES),
    ("skew_kl", {"alpha": 0.6}),
    ("skew_reverse_kl", {"alpha": 0.6}),
    ("alpha_beta", {"alpha": 1.5, "beta": 0.5}),
    ("adaptive_kl", {"mu": 0.8}),
]


def pair(*, gap=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student_logits_NV = 3 * torch.randn(N, V, generator=generator)
    teacher_logits_NV = student_logits_NV + gap * torch.randn(N, V, generator=generator)
    return student_logits_NV.requires_grad_(), teacher_logits_NV


def value(student_logits_NV, teacher_logits_NV, divergence, options=None, **more):
    student, teacher = LogitsSignal(student_logits_NV), LogitsSignal(teacher_logits_NV)
    return token_divergence(student, teacher, divergence=divergence, divergence_options=options, **more).values_N


def gradient(values_N, wrt):
    return torch.autograd.grad(values_N, wrt, torch.linspace(-1, 2, N, dtype=values_N.dtype))[0]


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(("divergence", "options"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("gap", [2.0, 0.1])
def test_values_and_gradient_equal_the_oracle(divergence, options, temperature, gap):
    student_logits_NV, teacher_logits_NV = pair(gap=gap)
    actual_N = value(student_logits_NV, teacher_logits_NV, divergence, options, temperature=temperature)
    expected_N = reference_divergence(
        student_logits_NV,
        teacher_logits_NV,
        divergence=divergence,
        temperature=temperature,
        **options,
    )
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=2e-5, atol=5e-6)
    assert_close_in_norm(gradient(actual_N, student_logits_NV), gradient(expected_N, student_logits_NV), tolerance=2e-5)


@pytest.mark.parametrize("options", [(1e-6, 1.0), (1e-4, 0.5), (0.2, 0.7), (0.7, 1e-6), (1e-3, 1e-3)])
@pytest.mark.parametrize("gap", [1.0, 0.03])
def test_small_options_of_alpha_beta_leave_value_and_gradient_right_in_proportion(options, gap):
    options = dict(zip(("alpha", "beta"), options, strict=True))
    student_logits_NV, teacher_logits_NV = pair(gap=gap)
    actual_N = value(student_logits_NV, teacher_logits_NV, "alpha_beta", options)
    expected_N = reference_divergence(student_logits_NV, teacher_logits_NV, divergence="alpha_beta", **options)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-3, atol=0)
    assert_close_in_norm(gradient(actual_N, student_logits_NV), gradient(expected_N, student_logits_NV), tolerance=4e-5)


def test_compiled_slopes_of_close_models_are_right_in_proportion_too():
    log_q_NV, log_p_NV = (logits_NV.detach().log_softmax(dim=1) for logits_NV in pair(gap=0.03))
    both = objective.Pair(log_q_NV.exp(), log_p_NV.exp(), log_q_NV, log_p_NV, log_q_NV - log_p_NV)
    numbers = {"alpha_beta": (1e-5, 0.7), "skew_kl": (0.99, 0.01), "skew_reverse_kl": (0.99, 0.01)}
    numbers = {name: tuple(map(torch.tensor, pair)) for name, pair in numbers.items()}

    def slopes():
        return [TERMS[name](both, *numbers[name])[1] for name in numbers]

    for actual_NV, expected_NV in zip(rows.Fused(slopes)(), slopes(), strict=True):
        assert_close_in_norm(actual_NV, expected_NV, tolerance=1e-5)


@pytest.mark.parametrize("divergence", NAMES)
def test_the_same_model_gives_no_loss_and_no_gradient(divergence):
    student_logits_NV, _ = pair()
    values_N = value(student_logits_NV, student_logits_NV.detach(), divergence)
    assert values_N.abs().max() < 2e-6
    assert gradient(values_N, student_logits_NV).abs().max() < 1e-6


@pytest.mark.parametrize("divergence", NAMES)
def test_tokens_impossible_on_both_sides_are_as_if_absent(divergence):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    without_NV = student_logits_NV[:, 5:].clone().requires_grad_()
    expected_N = value(without_NV, teacher_logits_NV[:, 5:].clone(), divergence)
    student_logits_NV[:, :5] = teacher_logits_NV[:, :5] = -math.inf
    student_logits_NV.requires_grad_()
    actual_N = value(student_logits_NV, teacher_logits_NV, divergence)
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-5, atol=1e-6)
    gradient_NV = gradient(actual_N, student_logits_NV)
    assert (gradient_NV[:, :5] == 0).all()
    torch.testing.assert_close(gradient_NV[:, 5:], gradient(expected_N, without_NV), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_possible_on_only_one_side_leaves_these_finite(divergence, side):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    (student_logits_NV if side == "student" else teacher_logits_NV)[:, 3] = -math.inf
    student_logits_NV.requires_grad_()
    actual_N = value(student_logits_NV, teacher_logits_NV, divergence)
    expected_N = reference_divergence(student_logits_NV, teacher_logits_NV, divergence=divergence)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=2e-5, atol=5e-6)
    # Of the formula by autograd, with a probability that is zero in all but name: of zero itself it would divide by.
    nearly_NV, other_NV = (
        logits_NV.detach().double().clamp_min(-600.0) for logits_NV in (student_logits_NV, teacher_logits_NV)
    )
    nearly_NV.requires_grad_()
    expected_NV = gradient(reference_divergence(nearly_NV, other_NV, divergence=divergence), nearly_NV)
    actual_NV = gradient(actual_N, student_logits_NV)
    torch.testing.assert_close(actual_NV.double(), expected_NV, rtol=1e-4, atol=1e-5)


def test_skewed_kls_have_the_kls_as_their_limits():
    student_logits_NV, teacher_logits_NV = (logits_NV.double() for logits_NV in pair())
    for divergence, beta in (("skew_kl", 0.0), ("skew_reverse_kl", 1.0)):
        torch.testing.assert_close(
            value(student_logits_NV, teacher_logits_NV, divergence, {"alpha": 1e-9}),
            reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta),
            rtol=1e-5,
            atol=1e-7,
        )


def test_the_alpha_beta_divergence_has_the_kls_as_its_limits():
    student_logits_NV, teacher_logits_NV = (logits_NV.double() for logits_NV in pair())
    for options, beta in (({"alpha": 1.0, "beta": 1e-12}, 0.0), ({"alpha": 1e-12, "beta": 1.0}, 1.0)):
        torch.testing.assert_close(
            value(student_logits_NV, teacher_logits_NV, "alpha_beta", options),
            reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("divergence", NAMES)
def test_hidden_states_and_a_top_k_of_all_tokens_give_what_logits_give(divergence):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        HiddenSignal(torch.randn(N, 8, generator=generator), Head(torch.randn(V, 8, generator=generator)))
        for _ in range(2)
    )
    student.hidden_NH.requires_grad_()
    student_logits_NV, teacher_logits_NV = (side.head.logits(side.hidden_NH) for side in (student, teacher))
    expected_N = value(student_logits_NV, teacher_logits_NV, divergence)
    expected_NH = gradient(expected_N, student.hidden_NH)
    all_tokens = TopKSignal(torch.arange(V).expand(N, V), teacher_logits_NV.log_softmax(dim=1), V)
    for other, tolerance in ((teacher, 1e-5), (all_tokens, 1e-4)):
        actual_N = token_divergence(student, other, divergence=divergence, token_block=4).values_N
        torch.testing.assert_close(actual_N, expected_N, rtol=tolerance, atol=tolerance)
        assert_close_in_norm(gradient(actual_N, student.hidden_NH), expected_NH, tolerance=tolerance)


def test_the_jsd_of_the_registry_is_that_of_the_other_oracle():
    student_logits_NV, teacher_logits_NV = pair()
    for beta in (0.0, 0.3, 1.0):
        torch.testing.assert_close(
            reference_divergence(student_logits_NV, teacher_logits_NV, divergence="jsd", temperature=2.0, beta=beta),
            reference_jsd(student_logits_NV, teacher_logits_NV, temperature=2.0, beta=beta),
        )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_oracle_takes_the_options_of_its_entry_and_no_other(name):
    defaults = {option: number.default for option, number in DIVERGENCES[name].options.items()}
    expected_N = reference_divergence(*pair(), divergence=name)
    assert torch.equal(reference_divergence(*pair(), divergence=name, **defaults), expected_N)
    with pytest.raises(GKDConfigError, match=r"got \['gamma'\]"):
        reference_divergence(*pair(), divergence=name, gamma=0.5)


def test_the_oracles_share_no_code_with_the_terms():
    tree = ast.parse(inspect.getsource(formulas))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "torch"}


@pytest.mark.parametrize("kind", TERMS)
def test_on_a_gpu_a_divergence_without_a_kernel_is_compared_by_plain_torch(kind, monkeypatch):
    monkeypatch.setattr(rows, "_triton_kinds", lambda: frozenset({"jsd"}))
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    engine = rows._suitable_engine(kind, on_gpu)
    assert engine == ("triton" if kind == "jsd" else "eager")

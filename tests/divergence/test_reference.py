"""The oracle against another form of the definition. Shapes: N tokens, V vocabulary."""

import math

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import reference_jsd
from gkd_trainer.divergence.reference import reference_topk_jsd
from gkd_trainer.errors import GKDConfigError

BETAS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)


def pair(N=5, V=11, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student_logits_NV = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    teacher_logits_NV = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return student_logits_NV, teacher_logits_NV


def kl(log_a_NV, log_b_NV):
    """KL(a‖b), in the argument order of kl_div(input=b, target=a)."""
    return functional.kl_div(log_b_NV, log_a_NV, reduction="none", log_target=True).sum(1)


def test_a_hand_computed_example_fixes_the_orientation():
    p, q = (0.8, 0.2), (0.5, 0.5)
    student_logits_NV, teacher_logits_NV = torch.tensor([q]).log(), torch.tensor([p]).log()

    def value(beta):
        return reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta).item()

    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    kl_p_m = 0.8 * math.log(0.8 / 0.53) + 0.2 * math.log(0.2 / 0.47)
    kl_q_m = 0.5 * math.log(0.5 / 0.53) + 0.5 * math.log(0.5 / 0.47)
    assert value(0.0) == pytest.approx(forward, rel=1e-6)
    assert value(1.0) == pytest.approx(reverse, rel=1e-6)
    assert value(0.1) == pytest.approx(0.1 * kl_p_m + 0.9 * kl_q_m, rel=1e-6)


def test_beta_zero_is_the_limit_of_small_beta_and_one_that_of_large():
    pair_NV = pair()
    torch.testing.assert_close(
        reference_jsd(*pair_NV, beta=1e-7) / 1e-7, reference_jsd(*pair_NV, beta=0.0), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        reference_jsd(*pair_NV, beta=1 - 1e-7) / 1e-7, reference_jsd(*pair_NV, beta=1.0), rtol=1e-5, atol=1e-7
    )
    assert not torch.allclose(reference_jsd(*pair_NV, beta=0.0), reference_jsd(*pair_NV, beta=1.0))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_equal_torch_kl_div(beta, temperature):
    student_logits_NV, teacher_logits_NV = pair()
    log_q_NV = functional.log_softmax(student_logits_NV / temperature, dim=1)
    log_p_NV = functional.log_softmax(teacher_logits_NV / temperature, dim=1)
    if beta == 0:
        expected_N = kl(log_p_NV, log_q_NV)
    elif beta == 1:
        expected_N = kl(log_q_NV, log_p_NV)
    else:
        log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
        expected_N = beta * kl(log_p_NV, log_m_NV) + (1 - beta) * kl(log_q_NV, log_m_NV)
    actual_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta, temperature=temperature)
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_the_closed_form(beta):
    student_logits_NV, teacher_logits_NV = pair()
    student_logits_NV.requires_grad_()
    T = 2.0
    values_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta, temperature=T)
    (actual_NV,) = torch.autograd.grad(values_N.sum(), student_logits_NV)

    q_NV, p_NV = (student_logits_NV / T).softmax(1).detach(), (teacher_logits_NV / T).softmax(1)
    if beta == 0:
        expected_NV = q_NV - p_NV
    else:
        m_NV = p_NV if beta == 1 else beta * p_NV + (1 - beta) * q_NV
        ratio_NV = (q_NV / m_NV).log()
        expected_NV = q_NV * (ratio_NV - (q_NV * ratio_NV).sum(1, keepdim=True))
        expected_NV *= 1.0 if beta == 1 else 1 - beta
    torch.testing.assert_close(actual_NV, expected_NV / T, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_masked_logits_give_no_nan_in_value_or_gradient(beta, side):
    student_logits_NV, teacher_logits_NV = pair()
    if side != "teacher":
        student_logits_NV[:, :3] = -math.inf
    if side != "student":
        teacher_logits_NV[:, :3] = -math.inf
    student_logits_NV.requires_grad_()
    values_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    is_infinite = (beta == 0 and side == "student") or (beta == 1 and side == "teacher")
    if is_infinite:
        assert values_N.tolist() == [math.inf] * 5
        return
    (gradient_NV,) = torch.autograd.grad(values_N.sum(), student_logits_NV)
    assert values_N.isfinite().all()
    assert gradient_NV.isfinite().all()
    if side != "teacher":
        assert (gradient_NV[:, :3] == 0).all()


def test_tokens_masked_on_both_sides_are_as_if_absent():
    student_logits_NV, teacher_logits_NV = pair()
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=0.3)
    masked_N3 = torch.full((5, 3), -math.inf, dtype=torch.float64)
    student_logits_NV = torch.cat([masked_N3, student_logits_NV], dim=1)
    teacher_logits_NV = torch.cat([masked_N3, teacher_logits_NV], dim=1)
    torch.testing.assert_close(reference_jsd(student_logits_NV, teacher_logits_NV, beta=0.3), expected_N)


@pytest.mark.parametrize("wrong", [{"scale": "continous"}, {"beta": 3.0}, {"beta": -0.1}])
def test_what_the_formula_does_not_know_is_refused(wrong):
    logits_NV, ids_NK = torch.zeros(2, 5), torch.tensor([[0, 1], [2, 3]])
    options = {"beta": 0.5, **wrong}
    with pytest.raises(GKDConfigError, match=next(iter(wrong))):
        reference_jsd(logits_NV, logits_NV, **options)
    with pytest.raises(GKDConfigError, match=next(iter(wrong))):
        reference_topk_jsd(logits_NV, ids_NK, torch.full((2, 2), -2.0), **options)
    with pytest.raises(GKDConfigError, match="tail must be one of 'bucket', 'renormalize'; got 'buckets'"):
        reference_topk_jsd(logits_NV, ids_NK, torch.full((2, 2), -2.0), beta=0.5, tail="buckets")

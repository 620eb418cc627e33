"""The divergence from top tokens against its float64 oracle. Shapes: N tokens, V vocabulary, K top tokens, H width."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_trainer.divergence import (
    reference_jsd,
    reference_topk_jsd,
    token_divergence,
    topk_generalized_jsd,
)
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import LogitsSignal, TopKSignal
from tests.divergence.topk_cases import (
    BETAS,
    TAILS,
    K,
    N,
    V,
    assert_close_in_norm,
    assert_values_close,
    gradients,
    hidden_signal,
    pair,
    signal,
    top,
    topk_divergence,
    upstream,
)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", ["paper", "continuous"])
@pytest.mark.parametrize(
    ("tail", "top_k"), [("bucket", 1), *((tail, top_k) for tail in TAILS for top_k in (2, 5, V - 1))]
)
def test_values_and_gradient_equal_the_oracle(beta, tail, scale, top_k):
    student_logits_NV, teacher_logits_NV = pair()
    ids_NK, log_p_NK = top(teacher_logits_NV, top_k)
    options = {"beta": beta, "tail": tail, "scale": scale}
    actual_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, **options)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, **options)
    assert actual_N.dtype == torch.float32
    assert_values_close(actual_N, expected_N, beta if scale == "paper" else 0)
    (actual_NV,), (expected_NV,) = gradients(actual_N, student_logits_NV), gradients(expected_N, student_logits_NV)
    assert_close_in_norm(actual_NV, expected_NV, tolerance=2e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("tail", "shape", "top_k"),
    [
        *(("bucket", shape, 1) for shape in ((1, 1), (3, 2))),
        *((tail, *sizes) for tail in TAILS for sizes in (((1, 13), 3), ((7, 2), 2), ((3, 257), 17))),
    ],
)
def test_odd_sizes_equal_the_oracle(beta, tail, shape, top_k):
    student_logits_NV, teacher_logits_NV = pair(*shape)
    ids_NK, log_p_NK = top(teacher_logits_NV, top_k)
    actual_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail)
    assert_values_close(actual_N, reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail), beta)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scale", ["paper", "continuous"])
def test_gradcheck_in_float64(beta, tail, scale):
    student_logits_NV, teacher_logits_NV = pair(3, 6, dtype=torch.float64)
    labels_N = torch.tensor([0, 5, 2])
    teacher = signal(teacher_logits_NV, 3)

    def divergence(student_logits_NV):
        result = topk_divergence(
            student_logits_NV, teacher, beta=beta, tail=tail, scale=scale, labels_N=labels_N, token_block=2
        )
        return result.values_N, result.cross_entropy_N

    assert torch.autograd.gradcheck(divergence, (student_logits_NV,))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_as_entries_give_the_full_divergence(beta, tail):
    student_logits_NV, teacher_logits_NV = pair()
    actual_N = topk_generalized_jsd(student_logits_NV, *top(teacher_logits_NV, V), beta=beta, tail=tail)
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    assert_values_close(actual_N, expected_N, beta)
    (actual_NV,), (expected_NV,) = gradients(actual_N, student_logits_NV), gradients(expected_N, student_logits_NV)
    assert_close_in_norm(actual_NV, expected_NV, tolerance=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_the_bucket_bounds_the_full_divergence_from_below_and_grows_with_k(beta):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair(N=64, dtype=torch.float64))
    full_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    bounds = [
        topk_generalized_jsd(student_logits_NV, *top(teacher_logits_NV, top_k), beta=beta)
        for top_k in (1, 2, 5, 30, V - 1)
    ]
    for lower_N, upper_N in zip(bounds, [*bounds[1:], full_N], strict=True):
        assert (lower_N <= upper_N + 1e-12).all()
    assert (bounds[0] >= 0).all()
    assert bounds[0].mean() < 0.9 * full_N.mean()


def test_a_hand_computed_example_fixes_orientation_and_tail():
    student_logits_NV = torch.tensor([[0.2, 0.3, 0.1, 0.4]]).log()
    ids_NK, log_p_NK = torch.tensor([[2, 0]]), torch.tensor([[0.6, 0.1]]).log()

    def value(**options):
        return topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, **options).item()

    forward = 0.6 * math.log(0.6 / 0.1) + 0.1 * math.log(0.1 / 0.2) + 0.3 * math.log(0.3 / 0.7)
    reverse = 0.1 * math.log(0.1 / 0.6) + 0.2 * math.log(0.2 / 0.1) + 0.7 * math.log(0.7 / 0.3)
    renormalized = 6 / 7 * math.log(6 / 7 * 3) + 1 / 7 * math.log(1 / 7 * 3 / 2)
    assert value(beta=0.0) == pytest.approx(forward, rel=1e-5)
    assert value(beta=1.0) == pytest.approx(reverse, rel=1e-5)
    assert value(beta=0.0, tail="renormalize") == pytest.approx(renormalized, rel=1e-5)


def test_the_example_of_the_documentation_has_these_figures():
    p_NV, q_NV = torch.tensor([[0.6, 0.2, 0.1, 0.1]]), torch.tensor([[0.3, 0.1, 0.5, 0.1]])
    log_q_NV, of_top = q_NV.log(), top(p_NV.log(), 2)
    assert reference_jsd(log_q_NV, p_NV.log(), beta=0.0).item() == pytest.approx(0.3936, abs=5e-5)
    assert topk_generalized_jsd(log_q_NV, *of_top, beta=0.0).item() == pytest.approx(0.3348, abs=5e-5)
    without_tail_N = topk_generalized_jsd(log_q_NV, *of_top, beta=0.0, tail="renormalize")
    assert without_tail_N.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_only_the_bucket_pulls_the_student_back_from_outside_the_top_k(beta):
    student_logits_NV, teacher_logits_NV = pair()
    ids_NK, log_p_NK = top(teacher_logits_NV)
    leaking_NV = student_logits_NV.detach().clone()
    is_outside_NV = torch.ones(N, V, dtype=torch.bool).scatter(1, ids_NK, False)
    leaking_NV[is_outside_NV] += 6
    leaking_NV.requires_grad_()
    bucket_N = topk_generalized_jsd(leaking_NV, ids_NK, log_p_NK, beta=beta)
    (bucket_NV,) = gradients(bucket_N, leaking_NV, torch.ones(N))
    assert (bucket_NV[is_outside_NV] > 0).all()
    renormalized_N = topk_generalized_jsd(leaking_NV, ids_NK, log_p_NK, beta=beta, tail="renormalize")
    (renormalized_NV,) = gradients(renormalized_N, leaking_NV)
    assert (renormalized_NV[is_outside_NV] == 0).all()
    assert (renormalized_NV[~is_outside_NV] != 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_no_entries_are_ignored_whatever_their_ids(beta, tail):
    student_logits_NV, teacher_logits_NV = pair()
    ids_NK, log_p_NK = top(teacher_logits_NV)
    wide = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta, tail=tail)
    meaningless_N3 = torch.tensor([[0, V + 50, -1]]).expand(N, 3).clone()
    meaningless_N3[:, 0] = ids_NK[:, 1]
    ids_NK = torch.cat([meaningless_N3, ids_NK], dim=1)
    log_p_NK = torch.cat([torch.full((N, 3), -math.inf), log_p_NK], dim=1)
    padded = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta, tail=tail)
    assert padded.is_teacher_finite_N.all()
    for name, expected_N in vars(wide).items():
        torch.testing.assert_close(getattr(padded, name), expected_N, rtol=1e-5, atol=1e-6, msg=name)
    assert_close_in_norm(
        gradients(padded.values_N, student_logits_NV)[0],
        gradients(wide.values_N, student_logits_NV)[0],
        tolerance=1e-5,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_the_mass_that_a_slice_removes_from_the_teacher_goes_to_the_tail(beta):
    student_logits_NV, teacher_logits_NV = pair()
    shared = 100
    sliced = signal(teacher_logits_NV, 20).sliced(shared)
    is_gone_NK = sliced.log_p_NK == -math.inf
    assert 0 < is_gone_NK.sum() < N * 20
    result = topk_divergence(student_logits_NV[:, :shared], sliced, beta=beta)
    kept_NV = teacher_logits_NV.softmax(dim=1)[:, :shared]
    expected_N = kept_NV.gather(1, sliced.ids_NK.clamp_max(shared - 1)).masked_fill(is_gone_NK, 0).sum(1)
    torch.testing.assert_close(result.teacher_mass_N, expected_N)
    expected_N = reference_topk_jsd(student_logits_NV[:, :shared], sliced.ids_NK, sliced.log_p_NK, beta=beta)
    assert_values_close(result.values_N, expected_N, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_of_a_slice_give_the_divergence_of_the_sliced_models(beta):
    student_logits_NV, teacher_logits_NV = pair()
    shared = 100
    student_logits_NV = student_logits_NV.detach()[:, :shared]
    sliced = signal(teacher_logits_NV, V).sliced(shared)
    actual_N = topk_generalized_jsd(student_logits_NV, sliced.ids_NK, sliced.log_p_NK, beta=beta)
    assert_values_close(actual_N, reference_jsd(student_logits_NV, teacher_logits_NV[:, :shared], beta=beta), beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("sigma", [0.1, 0.03])
def test_the_gradient_is_right_where_teacher_and_student_are_close(beta, tail, sigma):
    student_logits_NV, teacher_logits_NV = pair(V=4099, sigma=sigma)
    ids_NK, log_p_NK = top(teacher_logits_NV, 64)
    actual_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail)
    assert_close_in_norm(
        gradients(actual_N, student_logits_NV)[0], gradients(expected_N, student_logits_NV)[0], tolerance=1e-3
    )


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_sure_of_its_top_token_is_finite_with_a_gradient_like_the_oracles(beta):
    student_logits_NV, _ = pair()
    ids_NK = student_logits_NV.argmax(dim=1, keepdim=True)
    log_p_NK = torch.zeros(N, 1)
    result = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
    assert result.is_finite_N.all()
    assert_values_close(result.values_N, expected_N, beta)
    assert_close_in_norm(
        gradients(result.values_N, student_logits_NV)[0], gradients(expected_N, student_logits_NV)[0], tolerance=1e-5
    )


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_hardly_leaves_the_top_k_has_a_finite_value_and_gradient(beta):
    """Its tail underflows as a probability, though not as a logarithm."""
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    ids_NK, log_p_NK = top(teacher_logits_NV)
    student_logits_NV = student_logits_NV.scatter(1, ids_NK, 300 + student_logits_NV.gather(1, ids_NK))
    student_logits_NV.requires_grad_()
    actual_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-4, atol=1e-6)
    assert_close_in_norm(
        gradients(actual_N, student_logits_NV)[0], gradients(expected_N, student_logits_NV)[0], tolerance=1e-4
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mass", [1.0, 0.75])
def test_a_student_without_a_tail_is_infinitely_far_only_from_a_teacher_with_one(beta, mass):
    student_logits_NV = torch.full((N, V), -math.inf)
    student_logits_NV[:, :2] = 1.0
    student_logits_NV.requires_grad_()
    ids_NK, log_p_NK = torch.tensor([[0, 1]]).expand(N, 2), torch.full((N, 2), mass / 2).log()
    result = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta)
    is_infinite = beta == 0 and mass < 1
    assert result.is_finite_N.tolist() == [not is_infinite] * N
    assert not result.values_N.isnan().any()
    (gradient_NV,) = gradients(result.values_N, student_logits_NV)
    if mass == 1:
        assert result.values_N.abs().max() < 1e-6
    elif not is_infinite:
        expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
        torch.testing.assert_close(result.values_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    # Both entries are alike to both sides, and what is infinite passes nothing back.
    assert gradient_NV.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_logits_far_from_zero_are_compared_as_precisely(beta, offset):
    student_logits_NV, _ = pair()
    student_logits_NV = (student_logits_NV.detach() + offset).requires_grad_()
    noise_NV = 0.03 * torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    ids_NK, log_p_NK = top((student_logits_NV.detach() - offset) + noise_NV)
    actual_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta)
    assert_close_in_norm(
        gradients(actual_N, student_logits_NV)[0], gradients(expected_N, student_logits_NV)[0], tolerance=1e-4
    )


@pytest.mark.parametrize("beta", BETAS)
def test_the_same_model_gives_no_loss_and_no_gradient(beta):
    student_logits_NV, _ = pair()
    values_N = topk_generalized_jsd(student_logits_NV, *top(student_logits_NV.detach()), beta=beta)
    assert values_N.abs().max() < 1e-6
    assert gradients(values_N, student_logits_NV)[0].abs().max() < 2e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_position_without_entries_is_equal_and_moves_nothing(beta, tail):
    student_logits_NV, teacher_logits_NV = pair()
    ids_NK, log_p_NK = top(teacher_logits_NV)
    log_p_NK[1] = -math.inf
    result = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta, tail=tail)
    assert result.is_teacher_finite_N.all()
    assert result.values_N[1] == result.teacher_entropy_N[1] == result.teacher_mass_N[1] == 0
    assert not result.agrees_N[1]
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail)
    assert_values_close(result.values_N, expected_N, beta)
    (gradient_NV,) = gradients(result.values_N, student_logits_NV)
    assert (gradient_NV[1] == 0).all()
    assert (gradient_NV[0] != 0).any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_flags_mark_only_rows_that_are_not_finite(beta, tail):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair(N=9))
    ids_NK, log_p_NK = top(teacher_logits_NV)
    clean_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=beta, tail=tail)
    log_p_NK[0, 1] = math.nan
    log_p_NK[1, 2] = math.inf
    log_p_NK[2] = 0.0
    log_p_NK[3, 0] = 2e-3
    log_p_NK[4, :2] = math.log(0.6)
    ids_NK[5, 3] = V
    is_outside_V = torch.ones(V, dtype=torch.bool).scatter(0, ids_NK[6], False)
    student_logits_NV[6, is_outside_V.nonzero()[3, 0]] = math.nan
    student_logits_NV[7, ids_NK[7, 2]] = math.inf
    student_logits_NV.requires_grad_()
    result = topk_divergence(student_logits_NV, TopKSignal(ids_NK, log_p_NK, V), beta=beta, tail=tail)
    assert result.is_teacher_finite_N.tolist() == [False] * 6 + [True] * 3
    assert result.is_finite_N.tolist() == [False] * 8 + [True]
    assert not result.agrees_N[:8].any()
    assert result.values_N[8] == clean_N[8]
    (gradient_NV,) = gradients(result.values_N, student_logits_NV)
    assert (gradient_NV[:8] == 0).all()
    assert (gradient_NV[8] != 0).sum() == (V if tail == "bucket" else K)
    alone_NV = student_logits_NV[8:].detach().requires_grad_()
    alone = topk_divergence(alone_NV, TopKSignal(ids_NK[8:], log_p_NK[8:], V), beta=beta, tail=tail)
    expected_NV = torch.autograd.grad(alone.values_N, alone_NV, upstream(9)[8:])[0]
    torch.testing.assert_close(gradient_NV[8:], expected_NV)


def test_rounding_of_a_mass_near_one_is_not_taken_for_a_broken_teacher():
    student_logits_NV, _ = pair()
    log_p_NK = torch.full((N, K), (1 + 5e-4) / K).log()
    result = topk_divergence(student_logits_NV, TopKSignal(torch.arange(K).expand(N, K), log_p_NK, V), beta=1.0)
    assert result.is_teacher_finite_N.all()
    assert result.is_finite_N.all()


@pytest.mark.parametrize("tail", TAILS)
def test_entropies_masses_agreement_and_acceptance_equal_plain_torch(tail):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair(64, 31, sigma=3.0))
    teacher = signal(teacher_logits_NV)
    student_logits_NV[0, 4] = -math.inf
    result = topk_divergence(student_logits_NV, teacher, beta=0.5, tail=tail)
    p_NK, q_NV = teacher.log_p_NK.exp(), student_logits_NV.softmax(dim=1)
    torch.testing.assert_close(result.student_entropy_N, torch.special.entr(q_NV).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.teacher_mass_N, p_NK.sum(1))
    torch.testing.assert_close(result.student_mass_N, q_NV.gather(1, teacher.ids_NK).sum(1))
    p_NC = torch.cat([p_NK, 1 - p_NK.sum(1, keepdim=True)], dim=1)
    if tail == "renormalize":
        p_NC = p_NK / p_NK.sum(1, keepdim=True)
    torch.testing.assert_close(result.teacher_entropy_N, torch.special.entr(p_NC).sum(1), rtol=1e-5, atol=1e-5)
    q_NK = q_NV.gather(1, teacher.ids_NK)
    q_NC = torch.cat([q_NK, 1 - q_NK.sum(1, keepdim=True)], dim=1)
    if tail == "renormalize":
        q_NC = q_NK / q_NK.sum(1, keepdim=True)
    torch.testing.assert_close(result.acceptance_N, torch.minimum(p_NC, q_NC).sum(1), rtol=1e-5, atol=1e-6)
    full_N = torch.special.entr(teacher_logits_NV.softmax(1)).sum(1)
    assert (result.teacher_entropy_N <= full_N).all()
    expected_N = student_logits_NV.argmax(1) == teacher_logits_NV.argmax(1)
    assert result.agrees_N.tolist() == expected_N.tolist()
    assert 0 < expected_N.sum() < 64


def test_a_teacher_with_full_distributions_has_no_masses():
    student_logits_NV, teacher_logits_NV = pair()
    result = token_divergence(LogitsSignal(student_logits_NV), LogitsSignal(teacher_logits_NV), beta=0.5)
    assert result.teacher_mass_N is None
    assert result.student_mass_N is None


@pytest.mark.parametrize("tail", TAILS)
def test_cross_entropy_is_that_of_all_tokens_and_adds_its_gradient(tail):
    student_logits_NV, teacher_logits_NV = pair()
    teacher = signal(teacher_logits_NV)
    labels_N = torch.tensor([0, V - 1, 7, 6, -100, int(teacher.ids_NK[5, 0]), int(teacher.ids_NK[6, 4])])
    result = topk_divergence(student_logits_NV, teacher, beta=0.1, tail=tail, labels_N=labels_N)
    expected_N = functional.cross_entropy(student_logits_NV.double(), labels_N, reduction="none")
    torch.testing.assert_close(result.cross_entropy_N.double(), expected_N, rtol=1e-6, atol=1e-6)
    divergence_N = reference_topk_jsd(student_logits_NV, teacher.ids_NK, teacher.log_p_NK, beta=0.1, tail=tail)
    assert_close_in_norm(
        gradients(0.7 * result.values_N - 0.2 * result.cross_entropy_N, student_logits_NV)[0],
        gradients(0.7 * divergence_N - 0.2 * expected_N, student_logits_NV)[0],
        tolerance=1e-5,
    )


def test_broken_rows_and_labels_do_not_reach_each_others_gradient():
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    teacher = signal(teacher_logits_NV)
    teacher.log_p_NK[0, 0] = math.nan
    student_logits_NV[1, 7] = -math.inf
    student_logits_NV.requires_grad_()
    labels_N = torch.tensor([3, 7, V, -1, 4, 5, 6])
    result = topk_divergence(student_logits_NV, teacher, beta=0.5, labels_N=labels_N)
    assert result.cross_entropy_N[1:4].tolist() == [math.inf] * 3
    (gradient_NV,) = gradients(result.cross_entropy_N, student_logits_NV)
    assert (gradient_NV[1:4] == 0).all()
    (both_NV,) = gradients(result.values_N + result.cross_entropy_N, student_logits_NV)
    torch.testing.assert_close(both_NV[0], gradient_NV[0])
    (value_gradient_NV,) = gradients(topk_divergence(student_logits_NV, teacher, beta=0.5).values_N, student_logits_NV)
    torch.testing.assert_close(both_NV, value_gradient_NV + gradient_NV)
    assert (both_NV[4:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student_logits_NV, teacher_logits_NV = pair(dtype=dtype)
    ids_NK, log_p_NK = top(teacher_logits_NV.float())
    values_N = topk_generalized_jsd(student_logits_NV, ids_NK, log_p_NK, beta=0.5)
    expected_N = reference_topk_jsd(student_logits_NV, ids_NK, log_p_NK, beta=0.5)
    assert_values_close(values_N, expected_N, 0.5)
    (actual_NV,), (expected_NV,) = gradients(values_N, student_logits_NV), gradients(expected_N, student_logits_NV)
    assert actual_NV.dtype == dtype
    assert_close_in_norm(actual_NV, expected_NV, tolerance=torch.finfo(dtype).eps)


class RefuseHostSynchronisation(TorchDispatchMode):
    """Raise on whatever would make the host wait for values on a device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")):
            raise AssertionError(f"{name} waits for the device")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_hidden", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_no_value_is_read_on_the_host_forward_or_backward(is_hidden, tail):
    teacher = signal(pair()[1])
    student = hidden_signal() if is_hidden else LogitsSignal(pair()[0])
    leaf = student.hidden_NH if is_hidden else student.logits_NV
    with RefuseHostSynchronisation():
        result = token_divergence(student, teacher, beta=0.5, tail=tail, labels_N=torch.arange(N))
        (result.values_N.sum() + result.cross_entropy_N.sum()).backward()
    assert leaf.grad is not None


class RecordNewStorages(TorchDispatchMode):
    """Record, by its size in elements, the memory of every tensor made that doesn't share that of `known`."""

    def __init__(self, known):
        super().__init__()
        self.known, self.tensors_of_size = known.untyped_storage().data_ptr(), {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                storage = tensor.untyped_storage()
                size = storage.nbytes() // tensor.element_size()
                self.tensors_of_size.setdefault(size, {})[storage.data_ptr()] = tensor
        return outputs


def test_nothing_as_large_as_the_logits_is_made_but_the_gradient():
    student_logits_NV, teacher_logits_NV = pair(32)
    teacher = signal(teacher_logits_NV)
    with RecordNewStorages(student_logits_NV) as forward:
        result = topk_divergence(student_logits_NV, teacher, beta=0.5, labels_N=torch.arange(32), token_block=4)
        loss = result.values_N.sum() + result.cross_entropy_N.sum()
    assert max(forward.tensors_of_size) == 4 * V
    with RecordNewStorages(student_logits_NV) as backward:
        torch.autograd.grad(loss, student_logits_NV)
    assert sorted(backward.tensors_of_size)[-2:] == [4 * V, 32 * V]
    assert len(backward.tensors_of_size[32 * V]) == 1


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (
            {},
            {"temperature": 2.0},
            r"temperature=2.0 can't be applied to a teacher's top tokens: .*Set temperature to 1",
        ),
        (
            {"ids_NK": torch.zeros(N, 1, dtype=torch.long), "log_p_NK": torch.zeros(N, 1)},
            {"tail": "renormalize"},
            "tail='renormalize' .* top k of 1 .*nothing is trained: set tail to 'bucket'",
        ),
        ({}, {"tail": "drop"}, r"tail must be one of 'bucket', 'renormalize'; got 'drop'"),
        ({"ids_NK": torch.zeros(N, K)}, {}, r"top tokens must be an int64 tensor \[N, K\].*got torch.float32 \[7, 5\]"),
        ({"ids_NK": torch.zeros(N, 0, dtype=torch.long)}, {}, r"K of at least 1.*got torch.int64 \[7, 0\]"),
        ({"ids_NK": torch.zeros(1, N, K, dtype=torch.long)}, {}, r"flatten the batch.*got torch.int64 \[1, 7, 5\]"),
        (
            {"log_p_NK": torch.zeros(N, K + 1)},
            {},
            r"log-probs must be a float.*\[7, 5\].*got torch.float32 \[7, 6\]",
        ),
        (
            {"log_p_NK": torch.zeros(N, K).bfloat16()},
            {},
            r"log-probs must be a float32 .*got torch.bfloat16.*rounding loses the mass",
        ),
        ({"vocab_size": V + 1}, {}, r"got 131 tokens for the student and 132 for the teacher"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, options, message):
    student_logits_NV, teacher_logits_NV = pair()
    with pytest.raises(GKDConfigError, match=message):
        token_divergence(
            LogitsSignal(student_logits_NV),
            replace(signal(teacher_logits_NV), **teacher),
            **{"beta": 0.5, **options},
        )


def test_scores_of_other_positions_are_refused():
    with pytest.raises(GKDConfigError, match=r"N = 7 for the student and N = 6 for the teacher"):
        token_divergence(LogitsSignal(pair()[0]), signal(pair(N=6)[1]), beta=0.5)

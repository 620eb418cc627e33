"""The divergence from top tokens and a student's hidden states. Shapes: N tokens, V vocabulary, K top tokens."""

import math
from dataclasses import replace

import pytest
import torch

from gkd_trainer.divergence import (
    linear_topk_generalized_jsd,
    reference_topk_jsd,
    token_divergence,
)
from gkd_trainer.signals import LogitsSignal
from tests.divergence.topk_cases import (
    TAILS,
    H,
    N,
    V,
    assert_close_in_norm,
    gradients,
    hidden_signal,
    leaves,
    linear_topk_divergence,
    oracle_logits,
    pair,
    signal,
    top,
    topk_divergence,
    upstream,
)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("token_block", [1, 3, 256, None])
def test_hidden_states_equal_the_oracle_in_tiles_of_any_size(beta, tail, token_block):
    student = hidden_signal(scale=0.7, softcap=5.0)
    ids_NK, log_p_NK = top(pair()[1])
    actual_N = linear_topk_generalized_jsd(
        student.hidden_NH,
        student.head.weight_VH,
        ids_NK,
        log_p_NK,
        beta=beta,
        tail=tail,
        scale="continuous",
        student_bias=student.head.bias_V,
        student_logit_scale=0.7,
        student_softcap=5.0,
        token_block=token_block,
    )
    expected_N = reference_topk_jsd(oracle_logits(student), ids_NK, log_p_NK, beta=beta, tail=tail, scale="continuous")
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(actual_N, leaves(student)), gradients(expected_N, leaves(student)), strict=True)
    for actual, expected in pairs:
        assert_close_in_norm(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("token_block", [1, 3, None])
def test_every_field_from_hidden_states_equals_that_from_logits_in_tiles_of_any_size(token_block):
    student, teacher = hidden_signal(), signal(pair()[1])
    options = {"beta": 0.3, "labels_N": torch.arange(N)}
    expected = topk_divergence(student.head.logits(student.hidden_NH), teacher, **options)
    from_hidden = linear_topk_divergence(student, teacher, token_block=token_block, **options)
    from_logits = topk_divergence(student.head.logits(student.hidden_NH), teacher, token_block=token_block, **options)
    for actual in (from_hidden, from_logits):
        for name, expected_N in vars(expected).items():
            torch.testing.assert_close(getattr(actual, name), expected_N, rtol=1e-5, atol=1e-6, msg=name)
        for part in ("values_N", "cross_entropy_N"):
            pairs = zip(
                gradients(getattr(actual, part), leaves(student)),
                gradients(getattr(expected, part), leaves(student)),
                strict=True,
            )
            for actual_gradient, expected_gradient in pairs:
                assert_close_in_norm(actual_gradient, expected_gradient, tolerance=5e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16_hidden_states_give_the_gradient_of_logits_that_were_never_rounded(beta, is_autocast):
    student = hidden_signal(N=16, dtype=torch.bfloat16, with_bias=False)
    noise_NV = torch.randn(16, V, generator=torch.Generator().manual_seed(2))
    teacher = signal((oracle_logits(student).detach() + 0.1 * noise_NV).float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        actual_N = token_divergence(student, teacher, beta=beta, token_block=5).values_N
    expected_N = reference_topk_jsd(oracle_logits(student), teacher.ids_NK, teacher.log_p_NK, beta=beta)
    pairs = zip(gradients(actual_N, leaves(student)), gradients(expected_N, leaves(student)), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == torch.bfloat16
        # Only the finished gradient is rounded: half a unit in the last of bfloat16's 8 bits.
        assert_close_in_norm(actual, expected, tolerance=2**-8)


def test_a_weight_tied_to_the_embedding_gets_the_sum_of_both_gradients():
    """The weight that projects the hidden states also made them."""
    weight_VH = hidden_signal().head.weight_VH
    inputs_N = torch.arange(N)
    ids_NK, log_p_NK = top(pair()[1])
    actual_N = linear_topk_generalized_jsd(weight_VH[inputs_N], weight_VH, ids_NK, log_p_NK, beta=0.5, token_block=3)
    double_VH = weight_VH.double()
    expected_N = reference_topk_jsd(double_VH[inputs_N] @ double_VH.T, ids_NK, log_p_NK, beta=0.5)
    assert_close_in_norm(gradients(actual_N, weight_VH)[0], gradients(expected_N, weight_VH)[0], tolerance=1e-5)


@pytest.mark.parametrize("trained", ["hidden_NH", "weight_VH", "bias_V"])
def test_gradients_reach_only_what_requires_one(trained):
    student, teacher = hidden_signal(requires_grad=False), signal(pair()[1])
    owner = student if trained == "hidden_NH" else student.head
    getattr(owner, trained).requires_grad_()
    teacher.log_p_NK.requires_grad_()
    token_divergence(student, teacher, beta=0.5, token_block=3).values_N.sum().backward()
    tensors = {"hidden_NH": student.hidden_NH, **vars(student.head), "log_p_NK": teacher.log_p_NK}
    with_gradient = [
        name for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor) and tensor.grad is not None
    ]
    assert with_gradient == [trained]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", TAILS)
def test_no_tokens_give_a_zero_that_is_connected_to_the_graph(beta, tail):
    teacher = signal(torch.zeros(0, V))
    student, student_logits_NV = hidden_signal(N=0), torch.zeros(0, V, requires_grad=True)
    labels_N = torch.zeros(0, dtype=torch.long)
    for signal_of_none, wrt in ((student, leaves(student)), (LogitsSignal(student_logits_NV), [student_logits_NV])):
        result = token_divergence(signal_of_none, teacher, beta=beta, tail=tail, labels_N=labels_N)
        loss = result.values_N.sum() + result.cross_entropy_N.sum()
        assert loss.item() == 0
        for tensor, gradient in zip(wrt, torch.autograd.grad(loss, wrt), strict=True):
            assert gradient.shape == tensor.shape
            assert (gradient == 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_from_hidden_states_nothing_larger_than_the_inputs_is_kept_between_the_passes(tail):
    student, teacher = hidden_signal(N=64), signal(pair(N=64)[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        values_N = linear_topk_divergence(
            student, teacher, beta=0.5, tail=tail, labels_N=torch.arange(64), token_block=16
        ).values_N
    assert max(kept) <= V * H  # the head's weight
    assert 16 * V > V * H
    values_N.sum().backward()


@pytest.mark.parametrize("token_block", [3, None])
def test_an_infinite_row_does_not_reach_the_weights_gradient(token_block):
    student, teacher = hidden_signal(), signal(pair()[1])
    clean_N = linear_topk_divergence(student, teacher, beta=0.5).values_N
    expected = gradients(clean_N, leaves(student), upstream() * (torch.arange(N) != 3))
    broken_log_p_NK = teacher.log_p_NK.clone()
    broken_log_p_NK[3, 2] = math.nan
    broken = replace(teacher, log_p_NK=broken_log_p_NK)
    result = linear_topk_divergence(student, broken, beta=0.5, token_block=token_block)
    assert result.is_teacher_finite_N.tolist() == [row != 3 for row in range(N)]
    actual = gradients(result.values_N, leaves(student))
    for actual_gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_gradient, expected_gradient)

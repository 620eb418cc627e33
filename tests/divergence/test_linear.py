"""The path from hidden states against the float64 oracle. Shapes: N tokens, V vocabulary, H, G hidden widths."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import linear, reference_jsd, token_divergence
from gkd_trainer.divergence.dense import dense_divergence
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.signals import Head, HiddenSignal

BETAS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
N, V, H, G = 11, 67, 8, 13


def objective_of(*, beta, temperature=1.0, scale="paper"):
    return Objective(beta=beta, temperature=temperature, is_continuous=scale == "continuous")


def linear_divergence(student, teacher, *, labels_N=None, label_weight_N=None, token_block=None, **options):
    return linear.linear_divergence(
        student,
        teacher,
        objective=objective_of(**options),
        labels_N=labels_N,
        label_weight_N=label_weight_N,
        token_block=token_block,
    )


def signal(*, N=N, width=H, V=V, seed=0, dtype=torch.float32, requires_grad=True, with_bias=True, **head):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, std):
        values = std * torch.randn(*shape, generator=generator)
        return values.to(dtype).requires_grad_(requires_grad)

    hidden_NH = leaf(N, width, std=1.0)
    weight_VH = leaf(V, width, std=2 / width**0.5)
    return HiddenSignal(hidden_NH, Head(weight_VH, leaf(V, std=0.5) if with_bias else None, **head))


def student_and_teacher(**options):
    student = signal(scale=0.7, softcap=5.0, **options)
    teacher = signal(width=G, seed=1, scale=1.3, softcap=9.0, requires_grad=False, **options)
    return student, teacher


def leaves(signal):
    tensors = [signal.hidden_NH, signal.head.weight_VH, signal.head.bias_V]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def upstream(N=N):
    return torch.linspace(-1.0, 2.5, N)


def gradients(values_N, signal, upstream_N):
    upstream_N = upstream_N.to(values_N.dtype)
    return torch.autograd.grad(values_N, leaves(signal), upstream_N, retain_graph=True)


def oracle_logits(signal):
    head = signal.head
    bias_V = None if head.bias_V is None else head.bias_V.double()
    logits_NV = functional.linear(signal.hidden_NH.double(), head.weight_VH.double(), bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * (logits_NV / head.softcap).tanh()


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("token_block", [1, 7, 256, N, None])
def test_values_and_gradients_equal_the_oracle(beta, temperature, token_block):
    student, teacher = student_and_teacher()
    options = {"beta": beta, "temperature": temperature}
    actual_N = linear_divergence(student, teacher, token_block=token_block, **options).values_N
    expected_N = reference_jsd(oracle_logits(student), oracle_logits(teacher), **options)
    assert actual_N.dtype == torch.float32
    torch.testing.assert_close(
        actual_N.double(), expected_N, rtol=1e-5, atol=2e-6 * (beta * (1 - beta) or 1), check_dtype=False
    )
    expected_gradients = gradients(expected_N, student, upstream())
    for actual, expected in zip(gradients(actual_N, student, upstream()), expected_gradients, strict=True):
        assert actual.shape == expected.shape
        assert_close_in_norm(actual, expected, tolerance=5e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_in_float64_with_bias_scale_and_softcap(beta, with_bias):
    sizes = {"N": 3, "V": 5, "dtype": torch.float64, "with_bias": with_bias}
    student = signal(width=2, scale=0.7, softcap=3.0, **sizes)
    teacher = signal(width=3, seed=1, requires_grad=False, scale=1.5, softcap=4.0, **sizes)
    labels_N = torch.tensor([0, 4, 2])

    def divergence(hidden_NH, weight_VH, bias_V=None):
        student_now = HiddenSignal(hidden_NH, replace(student.head, weight_VH=weight_VH, bias_V=bias_V))
        result = linear_divergence(student_now, teacher, beta=beta, temperature=2.0, labels_N=labels_N, token_block=2)
        return result.values_N, result.cross_entropy_N

    assert torch.autograd.gradcheck(divergence, leaves(student))


@pytest.mark.parametrize("token_block", [1, 4, None])
def test_every_field_equals_that_of_the_path_from_logits(token_block):
    student, teacher = student_and_teacher()
    labels_N = torch.arange(N)
    options = {"beta": 0.3, "temperature": 2.0, "scale": "continuous"}
    actual = linear_divergence(student, teacher, token_block=token_block, labels_N=labels_N, **options)
    expected = dense_divergence(
        student.head.logits(student.hidden_NH),
        teacher.head.logits(teacher.hidden_NH),
        objective=objective_of(**options),
        labels_N=labels_N,
    )
    for name, expected_N in vars(expected).items():
        torch.testing.assert_close(getattr(actual, name), expected_N, rtol=1e-5, atol=1e-6, msg=name)
    for part in ("values_N", "cross_entropy_N"):
        pairs = zip(
            gradients(getattr(actual, part), student, upstream()),
            gradients(getattr(expected, part), student, upstream()),
            strict=True,
        )
        for actual_gradient, expected_gradient in pairs:
            assert_close_in_norm(actual_gradient, expected_gradient, tolerance=5e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16_inputs_give_the_gradient_of_logits_that_were_never_rounded(beta, sigma, is_autocast):
    student = signal(N=16, width=64, V=2003, dtype=torch.bfloat16, with_bias=False)
    noise_NH = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    # The head turns hidden states of size 1 into logits of size 2.
    teacher_hidden_NH = (student.hidden_NH.detach() + sigma / 2 * noise_NH).bfloat16()
    teacher = HiddenSignal(teacher_hidden_NH, Head(student.head.weight_VH.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        actual_N = token_divergence(student, teacher, beta=beta, token_block=5).values_N
    expected_N = reference_jsd(oracle_logits(student), oracle_logits(teacher), beta=beta)
    pairs = zip(gradients(actual_N, student, upstream(16)), gradients(expected_N, student, upstream(16)), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == torch.bfloat16
        # Only the finished gradient is rounded: half a unit in the last of bfloat16's 8 bits.
        assert_close_in_norm(actual, expected, tolerance=2**-8)


@pytest.mark.parametrize("trained", ["hidden_NH", "weight_VH", "bias_V"])
def test_gradients_reach_only_what_requires_one(trained):
    student, teacher = student_and_teacher()
    for tensor in leaves(student):
        tensor.requires_grad_(False)
    owner = student if trained == "hidden_NH" else student.head
    getattr(owner, trained).requires_grad_()
    for tensor in (teacher.hidden_NH, teacher.head.weight_VH, teacher.head.bias_V):
        tensor.requires_grad_()
    linear_divergence(student, teacher, beta=0.5, token_block=4).values_N.sum().backward()
    with_gradient = [
        (side, name)
        for side, of in (("student", student), ("teacher", teacher))
        for name, tensor in (("hidden_NH", of.hidden_NH), *vars(of.head).items())
        if isinstance(tensor, torch.Tensor) and tensor.grad is not None
    ]
    assert with_gradient == [("student", trained)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_tokens_give_a_zero_that_is_connected_to_the_graph(beta):
    student, teacher = student_and_teacher(N=0)
    loss = linear_divergence(student, teacher, beta=beta).values_N.sum()
    assert loss.item() == 0
    hidden_gradient, weight_gradient, bias_gradient = torch.autograd.grad(loss, leaves(student))
    assert hidden_gradient.shape == (0, H)
    assert (weight_gradient == 0).all()
    assert (bias_gradient == 0).all()


def test_without_grad_the_values_are_the_same_and_have_no_graph():
    student, teacher = student_and_teacher()
    expected_N = linear_divergence(student, teacher, beta=0.5, token_block=4).values_N.detach()
    with torch.no_grad():
        actual_N = linear_divergence(student, teacher, beta=0.5, token_block=4).values_N
    assert not actual_N.requires_grad
    assert torch.equal(actual_N, expected_N)


def test_between_the_passes_nothing_as_large_as_a_tiles_logits_is_kept():
    student, teacher = student_and_teacher()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: None):
        linear_divergence(student, teacher, beta=0.5, token_block=4)
    assert (4, V) not in kept


@pytest.mark.parametrize("beta", BETAS)
def test_the_same_model_gives_no_loss_and_no_gradient(beta):
    student, _ = student_and_teacher()
    values_N = linear_divergence(student, student, beta=beta, token_block=4).values_N
    assert values_N.abs().max() < 3e-7
    for gradient in gradients(values_N, student, torch.ones(N)):
        assert gradient.abs().max() < 1e-6


def test_an_infinite_row_does_not_reach_the_weights_gradient():
    student, teacher = student_and_teacher()
    broken_hidden_NG = teacher.hidden_NH.clone()
    broken_hidden_NG[3] = float("nan")
    result = linear_divergence(student, replace(teacher, hidden_NH=broken_hidden_NG), beta=0.5, token_block=4)
    assert result.is_teacher_finite_N.tolist() == [row != 3 for row in range(N)]
    actual = gradients(result.values_N, student, upstream())

    is_kept_N = torch.arange(N) != 3
    clean_N = linear_divergence(student, teacher, beta=0.5, token_block=4).values_N
    expected = gradients(clean_N, student, upstream() * is_kept_N)
    for actual_gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_gradient, expected_gradient)

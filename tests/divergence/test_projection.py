"""The products with a head: what they round, and what they never round."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.divergence import linear, projection, reference_jsd, token_divergence
from gkd_trainer.signals import Head, HiddenSignal
from tests.divergence.test_engine import NEEDS_CUDA, assert_close_in_norm, leaves, logits, signal, teacher


@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_block", [None, 7])
@pytest.mark.parametrize(
    ("device", "V"),
    [
        ("cpu", 2003),
        pytest.param("cuda", 2003, marks=[pytest.mark.gpu, NEEDS_CUDA]),
        pytest.param("cuda", 151_665, marks=[pytest.mark.gpu, NEEDS_CUDA]),
    ],
)
def test_gradients_from_bfloat16_products_are_right_to_a_percent_and_logits_are_not_rounded(
    sigma, dtype, token_block, device, V
):
    student = signal(N=16, width=64, V=V, dtype=dtype, device=device)
    noise_NH = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).to(device)
    # The head turns hidden states of size 1 into logits of size 2.
    hidden_NH = (student.hidden_NH + sigma / 2 * noise_NH).detach().to(dtype)
    other = HiddenSignal(hidden_NH, Head(student.head.weight_VH.detach()))
    options = {"beta": 0.5, "token_block": token_block}
    values_N = token_divergence(student, other, product_dtype=torch.bfloat16, **options).values_N
    oracle, of_other = student, other
    if device == "cpu" or dtype == torch.bfloat16:
        assert torch.equal(values_N, token_divergence(student, other, **options).values_N)
    else:  # on CUDA the inputs of the logits round too
        oracle, of_other = in_bfloat16(student), in_bfloat16(other)
    expected_N = reference_jsd(logits(oracle), logits(of_other), beta=0.5)
    pairs = zip(
        torch.autograd.grad(values_N.sum(), leaves(student)),
        torch.autograd.grad(expected_N.sum(), leaves(oracle)),
        strict=True,
    )
    for actual, expected in pairs:
        assert actual.dtype == dtype
        assert_close_in_norm(actual, expected, tolerance=1e-2)
        assert (actual.double() - expected).norm() > 1e-4 * expected.norm()  # they are rounded


def in_bfloat16(side):
    """The same predictions from inputs that were rounded, in new leaves."""
    hidden_NH, weight_VH = (leaf.detach().bfloat16().float().requires_grad_() for leaf in leaves(side))
    return HiddenSignal(hidden_NH, Head(weight_VH))


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.03])
def test_gradients_of_inputs_that_cuda_rounds_are_those_of_rounded_inputs(products, sigma):
    student = signal(N=16, width=64, V=2003)
    noise_NH = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    other = HiddenSignal((student.hidden_NH + sigma / 2 * noise_NH).detach(), Head(student.head.weight_VH.detach()))
    values_N = token_divergence(student, other, beta=0.5, product_dtype=torch.bfloat16).values_N
    assert products
    oracle = in_bfloat16(student)
    expected_N = reference_jsd(logits(oracle), logits(in_bfloat16(other)), beta=0.5)
    pairs = zip(
        torch.autograd.grad(values_N.sum(), leaves(student)),
        torch.autograd.grad(expected_N.sum(), leaves(oracle)),
        strict=True,
    )
    for actual, expected in pairs:
        assert_close_in_norm(actual, expected, tolerance=1e-2)


def test_float64_is_never_rounded_and_float16_not_on_a_cpu():
    for dtype, product_dtype in ((torch.float64, torch.bfloat16), (torch.float32, torch.float16)):
        student, other = signal(dtype=dtype), teacher(dtype=dtype)
        of_halves, expected = (
            torch.autograd.grad(token_divergence(student, other, product_dtype=each).values_N.sum(), leaves(student))
            for each in (product_dtype, None)
        )
        assert all(map(torch.equal, of_halves, expected))


@pytest.fixture
def products(monkeypatch):
    """Computes here the products of halves that CUDA sums in float32; the shapes of the results, as they are made."""
    made = []

    def mm(left, right, *, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16
        assert out.dtype == out_dtype == torch.float32
        made.append(tuple(out.shape))
        return out.copy_(left.float() @ right.float())

    def addmm(total, left, right, *, out_dtype, beta, alpha, out):
        assert out is total  # or torch copies it first
        product = torch.empty_like(total)
        mm(left, right, out_dtype=out_dtype, out=product)
        return out.copy_(alpha * product if beta == 0 else beta * total + alpha * product)

    monkeypatch.setattr(projection, "_sums_halves", lambda head, half: half is not None)
    monkeypatch.setattr(projection.torch, "mm", mm)
    monkeypatch.setattr(projection.torch, "addmm", addmm)
    # Uninitialised memory must not be read.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))
    return made


@pytest.mark.parametrize("used", [67, 60])
def test_on_cuda_each_tile_takes_one_product_for_each_gradient(products, used):
    student, other = (side.sliced(used) for side in (signal(), teacher()))
    student = replace(student, head=replace(student.head, scale=0.7))
    result = token_divergence(student, other, beta=0.5, product_dtype=torch.bfloat16, token_block=4)
    actual = torch.autograd.grad(result.values_N.sum(), leaves(student))
    tiles = [3, 4, 4]
    assert products == [shape for R in tiles for shape in ((R, used), (R, used), (R, 8), (used, 8))]
    expected = 0.7 * logits(student)[:, :used]
    expected_N = reference_jsd(expected, logits(other)[:, :used], beta=0.5)
    wanted = torch.autograd.grad(expected_N.sum(), leaves(student))
    for gradient, of_oracle in zip(actual, wanted, strict=True):
        assert_close_in_norm(gradient, of_oracle, tolerance=2e-2)
    assert (actual[1][used:] == 0).all()


def test_on_cuda_no_tokens_give_a_gradient_of_zero(products):
    student, other = signal(N=0), teacher(N=0)
    values_N = token_divergence(student, other, beta=0.5, product_dtype=torch.bfloat16).values_N
    for gradient in torch.autograd.grad(values_N.sum(), leaves(student)):
        assert (gradient == 0).all()


def test_slopes_are_multiplied_by_the_gain_of_float16_before_they_are_rounded(monkeypatch):
    monkeypatch.setattr(linear.Projection, "gain", 2.0**12)
    student, other = signal(), teacher()
    result = token_divergence(student, other, beta=0.5, token_block=4)
    expected_N = reference_jsd(logits(student), logits(other), beta=0.5)
    pairs = zip(
        torch.autograd.grad(result.values_N.sum(), leaves(student)),
        torch.autograd.grad(expected_N.sum(), leaves(student)),
        strict=True,
    )
    for actual, expected in pairs:
        assert_close_in_norm(actual, expected)

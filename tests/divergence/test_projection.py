"""The products with a head: what they round, and what they never round."""

import pytest
import torch

from gkd_trainer.divergence import reference_jsd, token_divergence
from gkd_trainer.signals import Head, HiddenSignal
from tests.divergence.test_engine import NEEDS_CUDA, assert_close_in_norm, leaves, logits, signal, teacher


@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_block", [None, 7])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA]),
    ],
)
def test_gradients_from_bfloat16_products_are_right_to_a_percent_and_logits_are_not_rounded(
    sigma, dtype, token_block, device
):
    student = signal(N=16, width=64, V=2003, dtype=dtype, device=device)
    noise_NH = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).to(device)
    # The head turns hidden states of size 1 into logits of size 2.
    other = HiddenSignal((student.hidden_NH + sigma / 2 * noise_NH).detach(), Head(student.head.weight_VH.detach()))
    options = {"beta": 0.5, "token_block": token_block}
    values_N = token_divergence(student, other, product_dtype=torch.bfloat16, **options).values_N
    if device == "cpu" or dtype == torch.bfloat16:  # on CUDA the inputs of the logits round too
        assert torch.equal(values_N, token_divergence(student, other, **options).values_N)
    expected_N = reference_jsd(logits(student), logits(other), beta=0.5)
    pairs = zip(
        torch.autograd.grad(values_N.sum(), leaves(student)),
        torch.autograd.grad(expected_N.sum(), leaves(student)),
        strict=True,
    )
    for actual, expected in pairs:
        assert actual.dtype == dtype
        assert_close_in_norm(actual, expected, tolerance=1e-2)
        assert (actual.double() - expected).norm() > 1e-4 * expected.norm()  # they are rounded


def test_float64_is_never_rounded_and_float16_not_on_a_cpu():
    for dtype, product_dtype in ((torch.float64, torch.bfloat16), (torch.float32, torch.float16)):
        student, other = signal(dtype=dtype), teacher(dtype=dtype)
        of_halves, expected = (
            torch.autograd.grad(token_divergence(student, other, product_dtype=each).values_N.sum(), leaves(student))
            for each in (product_dtype, None)
        )
        assert all(map(torch.equal, of_halves, expected))

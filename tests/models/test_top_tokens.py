"""The most probable tokens of hidden states and logits.

Shapes: N tokens, V vocabulary, H hidden width, K top tokens.
"""

import pytest
import torch

from gkd_trainer.models import top_tokens as module
from gkd_trainer.models.top_tokens import top_tokens
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal
from tests.memory import NewStorages

N, V, H, K = 11, 301, 16, 7

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def hidden_signal(N=N, V=V, H=H, *, dtype=torch.float32, weight_dtype=None, device="cpu", **options):
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH, bias_V = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((N, H), (V, H), (V,))
    )
    weight_VH = (weight_VH * 3 / H**0.5).to(weight_dtype or dtype)
    return HiddenSignal(hidden_NH.to(dtype), Head(weight_VH, bias_V.to(dtype), **options))


def oracle(signal):
    """Return the log-probs in float64."""
    head = signal.head.cut()
    logits_NV = signal.hidden_NH.double() @ head.weight_VH.double().T + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    return (logits_NV if head.softcap is None else head.softcap * (logits_NV / head.softcap).tanh()).log_softmax(dim=1)


def assert_top(actual, log_p_NV, k):
    """Compare log-probs with the largest of the oracle's, which float32 may put in another order if they are close."""
    assert actual.ids_NK.shape == (len(log_p_NV), k)
    assert all(len(set(ids_K)) == k for ids_K in actual.ids_NK.tolist())
    torch.testing.assert_close(actual.log_p_NK.double(), log_p_NV.topk(k, dim=1).values, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(actual.log_p_NK.double(), log_p_NV.gather(1, actual.ids_NK), rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_top_tokens_are_those_of_float64_in_blocks_of_any_size(monkeypatch, dtype, block, device):
    monkeypatch.setattr(module, "planned_tile", lambda N, V, device: block)
    signal = hidden_signal(dtype=dtype, device=device, scale=0.7, softcap=9.0)
    actual = top_tokens(signal, K)
    assert actual.log_p_NK.dtype == torch.float32
    assert actual.vocab_size == V
    assert_top(actual, oracle(signal), K)


@pytest.mark.parametrize("device", DEVICES)
def test_hidden_states_of_another_dtype_than_the_head_are_not_rounded_to_it(device):
    signal = hidden_signal(dtype=torch.float32, weight_dtype=torch.bfloat16, device=device)
    assert_top(top_tokens(signal, K), oracle(signal), K)


def test_a_padded_head_is_cut_and_all_of_a_vocabulary_can_be_asked_for():
    signal = hidden_signal().sliced(290)
    actual = top_tokens(signal, 290)
    assert_top(actual, oracle(signal), 290)
    torch.testing.assert_close(actual.log_p_NK.exp().sum(dim=1), torch.ones(N))


def test_of_logits_and_of_no_tokens():
    logits_NV = oracle(hidden_signal())
    assert_top(top_tokens(LogitsSignal(logits_NV.bfloat16()), K), logits_NV.bfloat16().double().log_softmax(dim=1), K)
    assert top_tokens(LogitsSignal(logits_NV[:0]), K).ids_NK.shape == (0, K)
    assert top_tokens(hidden_signal(N=0), K).log_p_NK.shape == (0, K)


def test_masked_logits_come_last_with_log_probs_of_minus_infinity():
    logits_NV = torch.full((2, 9), -torch.inf)
    logits_NV[:, 4], logits_NV[1, 7] = 1.0, 1.0
    top = top_tokens(LogitsSignal(logits_NV), 3)
    assert top.ids_NK[:, 0].tolist()[0] == 4
    assert sorted(top.ids_NK[1, :2].tolist()) == [4, 7]
    assert top.log_p_NK.exp().tolist() == [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]


def test_neither_the_logits_nor_the_head_are_converted_at_once(monkeypatch):
    monkeypatch.setattr(module, "planned_tile", lambda N, V, device: 8)
    signal = hidden_signal(64, 1003, 64, dtype=torch.bfloat16)
    with NewStorages() as memory:
        top_tokens(signal, K)
    assert memory.largest == 8 * 1003 * 4
    assert memory.peak < 3 * 8 * 1003 * 4 < 1003 * 64 * 4


def test_the_gradient_stops_at_the_teacher():
    signal = hidden_signal()
    signal.hidden_NH.requires_grad_()
    assert not top_tokens(signal, K).log_p_NK.requires_grad

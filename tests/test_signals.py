"""A head, and what slicing makes of predictions."""

import pytest
import torch

from gkd_trainer.signals import (
    GroupedSignal,
    Head,
    HiddenSignal,
    LogitsSignal,
    MappedSignal,
    SummedSignal,
    TopKSignal,
    plain_signals,
    scored_positions,
    tensors_of,
)


def test_a_head_scales_and_then_caps_its_logits():
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH, bias_V = (torch.randn(*shape, generator=generator) for shape in [(5, 4), (7, 4), (7,)])
    expected_NV = 3.0 * torch.tanh(0.25 * (hidden_NH @ weight_VH.T + bias_V) / 3.0)
    logits_NV = Head(weight_VH, bias_V, scale=0.25, softcap=3.0).logits(hidden_NH)
    torch.testing.assert_close(logits_NV, expected_NV)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "logits_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_logits_are_never_rounded_below_float32(hidden_dtype, weight_dtype, logits_dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(5, 16, generator=generator).to(hidden_dtype)
    weight_VH = torch.randn(7, 16, generator=generator).to(weight_dtype)
    logits_NV = Head(weight_VH).logits(hidden_NH)
    assert logits_NV.dtype == logits_dtype
    expected_NV = hidden_NH.double() @ weight_VH.double().T
    torch.testing.assert_close(logits_NV.double(), expected_NV, atol=1e-5, rtol=1e-5)


def test_slicing_a_head_slices_its_bias_and_keeps_scale_and_softcap():
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(5, 4, generator=generator)
    head = Head(torch.randn(7, 4, generator=generator), torch.randn(7, generator=generator), 0.5, 2.0)
    signal = HiddenSignal(hidden_NH, head)
    assert signal.vocab_size == 7
    sliced = signal.sliced(6)
    assert sliced.vocab_size == 6
    torch.testing.assert_close(sliced.head.logits(hidden_NH), head.logits(hidden_NH)[:, :6])
    assert sliced.head.cut().weight_VH.shape == (6, 4)
    assert sliced.head.cut().weight_VH.data_ptr() == head.weight_VH.data_ptr()
    assert sliced.sliced(3).head.logits(hidden_NH).shape == (5, 3)


def test_slicing_logits_keeps_the_first_tokens():
    logits_NV = torch.arange(12.0).reshape(2, 6)
    signal = LogitsSignal(logits_NV)
    assert signal.vocab_size == 6
    assert signal.sliced(4).logits_NV.tolist() == logits_NV[:, :4].tolist()


def test_several_signals_are_sliced_counted_and_listed_together():
    logits, hidden = LogitsSignal(torch.zeros(2, 7)), HiddenSignal(torch.zeros(2, 4), Head(torch.zeros(9, 4)))
    top = TopKSignal(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), 8)
    signal = GroupedSignal(torch.arange(5), (SummedSignal((logits, hidden), (1.0, 2.0)), top))
    assert signal.vocab_size == 7
    assert scored_positions(signal) == 5
    assert scored_positions(signal.groups[0]) == 2
    sliced = signal.sliced(6)
    assert [each.vocab_size for each in plain_signals(sliced)] == [6, 6, 6]
    assert sliced.groups[0].weights == (1.0, 2.0)


def test_the_tensors_of_a_signal_are_its_predictions_and_its_head():
    ids_NK, log_p_NK = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1)
    hidden_NH, weight_VH, bias_V = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
    for signal, expected in (
        (TopKSignal(ids_NK, log_p_NK, 4), [ids_NK, log_p_NK]),
        (LogitsSignal(hidden_NH), [hidden_NH]),
        (HiddenSignal(hidden_NH, Head(weight_VH)), [hidden_NH, weight_VH]),
        (MappedSignal(HiddenSignal(hidden_NH, Head(weight_VH, bias_V)), None), [hidden_NH, weight_VH, bias_V]),
    ):
        assert [*map(id, tensors_of(signal))] == [*map(id, expected)]

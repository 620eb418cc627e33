"""What each kind stores of a prediction, and how far the gradient is from the live teacher's."""

import math

import pytest
import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import LogitsSignal, TopKSignal
from gkd_trainer.teachers.cache.kinds import HalfHidden, IntegerHidden, TopK, channel_statistics, values_of
from tests.teachers.cache.rows import WEIGHT_VH, H, batch_of, hidden_signal, make_rows, sequence_of, states_of


@pytest.fixture(scope="module")
def hidden_PH():
    return torch.cat([states_of(sequence_of(*row)) for row in make_rows(60, longest=30)])


def integers(hidden_PH, item_size):
    return IntegerHidden(torch.float32, *channel_statistics([(hidden_PH,)]), item_size)


def returned(codec, *values):
    return codec.decode(codec.encode(values), len(values[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_come_back_bit_for_bit(hidden_PH, dtype):
    half_PH = hidden_PH.to(dtype)
    half_PH[0, 0], half_PH[1, 1] = -0.0, torch.finfo(dtype).tiny / 2  # a subnormal number
    [back_PH] = returned(HalfHidden(dtype, H), half_PH)
    assert back_PH.dtype == dtype
    assert torch.equal(back_PH.view(torch.int16), half_PH.view(torch.int16))


@pytest.mark.parametrize(("item_size", "size"), [(1, H + 4), (2, 2 * H + 4)])
def test_integers_are_within_half_a_step_of_their_group(hidden_PH, item_size, size):
    codec = integers(hidden_PH, item_size)
    assert len(codec.encode((hidden_PH,))) == size * len(hidden_PH)
    [back_PH] = returned(codec, hidden_PH)
    z_PH, back_z_PH = ((each - codec.mean_H) / codec.std_H for each in (hidden_PH, back_PH))
    for group in (slice(0, 64), slice(64, H)):
        step_P1 = z_PH[:, group].abs().amax(dim=1, keepdim=True) / (2 ** (8 * item_size - 1) - 1)
        # The scale is rounded up to float16.
        assert ((back_z_PH - z_PH)[:, group].abs() <= step_P1 * 0.502 + 1e-5).all()


def test_integers_take_states_beyond_those_of_the_statistics_constant_channels_and_no_states(hidden_PH):
    constant_PH = hidden_PH.clone()
    constant_PH[:, 7] = 3.0
    codec = integers(constant_PH, 2)
    [back_PH] = returned(codec, 50 * constant_PH)
    assert (back_PH - 50 * constant_PH).norm() < 1e-3 * (50 * constant_PH).norm()
    [back_PH] = returned(codec, codec.mean_H[None].clone())
    assert torch.allclose(back_PH, codec.mean_H[None], atol=1e-5)
    assert returned(codec, torch.empty(0, H))[0].shape == (0, H)


@pytest.mark.parametrize("has_wide_ids", [False, True])
def test_top_tokens_come_back_unchanged(has_wide_ids):
    ids_PK = torch.tensor([[3, 2**16 - 1, 0], [2**17 if has_wide_ids else 9, 1, -1]])
    log_p_PK = torch.tensor([[-0.1, -2.5000002, -30.0], [-1e-7, -17.0, -torch.inf]])
    codec = TopK(3, has_wide_ids)
    back_ids_PK, back_PK = returned(codec, ids_PK, log_p_PK)
    assert torch.equal(back_PK, log_p_PK)
    assert torch.equal(back_ids_PK, ids_PK.masked_fill(log_p_PK == -torch.inf, 0))
    assert back_ids_PK.dtype == torch.int64
    assert len(codec.encode((ids_PK, log_p_PK))) == 2 * 3 * (8 if has_wide_ids else 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_have_no_form(hidden_PH, value):
    broken_PH = hidden_PH.clone()
    broken_PH[2, 2] = value
    for codec in (HalfHidden(torch.bfloat16, H), integers(hidden_PH, 1)):
        with pytest.raises(ValueError, match="hidden states are not finite"):
            codec.encode((broken_PH,))
    with pytest.raises(ValueError, match="log-probs are not numbers"):
        TopK(1, has_wide_ids=False).encode((torch.tensor([[1]]), torch.tensor([[math.nan]])))


def test_a_signal_without_what_a_kind_stores_is_refused():
    batch = batch_of(make_rows(2))
    logits = LogitsSignal(torch.zeros(3, 5))
    with pytest.raises(
        GKDTeacherError, match=r"'hidden' stores final hidden states.*gives full logits: use kind='topk'"
    ):
        values_of(logits, "hidden")
    with pytest.raises(GKDTeacherError, match=r"'topk' stores its top tokens.*gives final hidden states: set"):
        values_of(hidden_signal(batch), "topk")
    with pytest.raises(GKDTeacherError, match=r"'hidden_int8' stores.*gives its top tokens"):
        values_of(TopKSignal(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), 5), "hidden_int8")


def gradient(teacher_NV, student_NV, beta):
    """The gradient with respect to the student's logits, as a formula in float64."""
    log_p_NV, log_q_NV = teacher_NV.double().log_softmax(-1), student_NV.double().log_softmax(-1)
    q_NV = log_q_NV.exp()
    if beta == 0:
        return q_NV - log_p_NV.exp()
    other_NV = log_p_NV
    if beta < 1:
        other_NV = (beta * log_p_NV.exp() + (1 - beta) * q_NV).log()
    ratio_NV = log_q_NV - other_NV
    factor = 1.0 if beta == 1 else 1 - beta
    return factor * q_NV * (ratio_NV - (q_NV * ratio_NV).sum(-1, keepdim=True))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("item_size", "largest"), [(2, 0.003), (1, 0.15)])
def test_at_a_divergence_of_0_02_the_gradient_is_the_live_teachers(hidden_PH, beta, item_size, largest):
    noise_PH = torch.randn(hidden_PH.shape, generator=torch.Generator().manual_seed(0)) * hidden_PH.std(dim=0)
    live_NV, student_NV = hidden_PH @ WEIGHT_VH.T, (hidden_PH + 0.115 * noise_PH) @ WEIGHT_VH.T
    log_p_NV = live_NV.log_softmax(-1)
    divergence = (log_p_NV.exp() * (log_p_NV - student_NV.log_softmax(-1))).sum(-1).mean()
    assert 0.018 < divergence < 0.022
    [back_PH] = returned(integers(hidden_PH, item_size), hidden_PH)
    expected_NV = gradient(live_NV, student_NV, beta)
    error_NV = gradient(back_PH @ WEIGHT_VH.T, student_NV, beta) - expected_NV
    assert error_NV.norm() < largest * expected_NV.norm()

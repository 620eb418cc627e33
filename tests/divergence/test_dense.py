"""The path from logits against the float64 oracle. Shapes: N tokens, V vocabulary."""

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_trainer.divergence import dense, reference_jsd
from gkd_trainer.divergence.objective import Objective

BETAS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
N, V = 5, 301


def dense_divergence(student_logits_NV, teacher_logits_NV, *, beta, temperature=1.0, scale="paper", **options):
    objective = Objective(beta=beta, temperature=temperature, is_continuous=scale == "continuous")
    return dense.dense_divergence(student_logits_NV, teacher_logits_NV, objective=objective, **options)


def pair(N=N, V=V, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student_logits_NV = 3 * torch.randn(N, V, generator=generator)
    teacher_logits_NV = student_logits_NV + 2 * torch.randn(N, V, generator=generator)
    return student_logits_NV.to(dtype).requires_grad_(), teacher_logits_NV.to(dtype)


def upstream(N=N):
    """Upstream gradients of both signs and different sizes."""
    return torch.linspace(-1.0, 2.5, N)


def assert_values_close(actual_N, expected_N, beta):
    """Compare with a tolerance that shrinks with the factor beta·(1 - beta) of the value."""
    atol = 2e-6 * (beta * (1 - beta) or 1)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=atol)


def gradient(values_N, wrt, upstream_N):
    return torch.autograd.grad(values_N, wrt, upstream_N.to(values_N.dtype))[0]


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_chunk", [1, 7, 256, V, None])
def test_values_and_gradient_equal_the_oracle(beta, temperature, vocab_chunk):
    student_logits_NV, teacher_logits_NV = pair()
    options = {"beta": beta, "temperature": temperature}
    actual_N = dense_divergence(student_logits_NV, teacher_logits_NV, vocab_chunk=vocab_chunk, **options).values_N
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, **options)
    assert actual_N.dtype == torch.float32
    assert_values_close(actual_N, expected_N, beta)
    assert_close_in_norm(
        gradient(actual_N, student_logits_NV, upstream()),
        gradient(expected_N, student_logits_NV, upstream()),
        tolerance=3e-6,
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.1, 0.03])
def test_the_gradient_is_right_where_teacher_and_student_are_close(beta, sigma):
    student_logits_NV, _ = pair(V=4099)
    noise_NV = torch.randn(N, 4099, generator=torch.Generator().manual_seed(1))
    teacher_logits_NV = student_logits_NV.detach() + sigma * noise_NV
    actual_N = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta).values_N
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    assert_close_in_norm(
        gradient(actual_N, student_logits_NV, upstream()),
        gradient(expected_N, student_logits_NV, upstream()),
        tolerance=3e-5,
    )


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("is_near_one", [False, True])
def test_the_value_is_as_precise_near_both_ends_of_beta(distance, is_near_one):
    student_logits_NV, teacher_logits_NV = pair()
    options = {"beta": 1 - distance if is_near_one else distance, "scale": "continuous"}
    actual_N = dense_divergence(student_logits_NV, teacher_logits_NV, **options).values_N
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, **options)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=2e-6, atol=0)
    assert_close_in_norm(
        gradient(actual_N, student_logits_NV, upstream()),
        gradient(expected_N, student_logits_NV, upstream()),
        tolerance=3e-6,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", ["paper", "continuous"])
def test_gradcheck_in_float64(beta, temperature, scale):
    student_logits_NV, teacher_logits_NV = pair(3, 5, dtype=torch.float64)
    labels_N = torch.tensor([0, 4, 2])

    def divergence(student_logits_NV):
        result = dense_divergence(
            student_logits_NV,
            teacher_logits_NV,
            beta=beta,
            temperature=temperature,
            scale=scale,
            labels_N=labels_N,
            vocab_chunk=2,
        )
        return result.values_N, result.cross_entropy_N

    assert torch.autograd.gradcheck(divergence, (student_logits_NV,))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (7, 2), (3, 257)])
def test_odd_sizes_equal_the_oracle(beta, shape):
    student_logits_NV, teacher_logits_NV = pair(*shape)
    actual_N = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta, vocab_chunk=2).values_N
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    assert_values_close(actual_N, expected_N, beta)


@pytest.mark.parametrize("offset", [-4096.0, 4096.0])
@pytest.mark.parametrize("vocab_chunk", [7, None])
def test_a_constant_added_to_all_logits_changes_nothing(offset, vocab_chunk):
    student_logits_NV, teacher_logits_NV = pair(dtype=torch.float64)
    plain = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5)
    moved = dense_divergence(student_logits_NV + offset, teacher_logits_NV - offset, beta=0.5, vocab_chunk=vocab_chunk)
    torch.testing.assert_close(moved.values_N, plain.values_N, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved.student_entropy_N, plain.student_entropy_N, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("offset", "temperature"), [(30.0, 1.0), (300.0, 1.0), (0.0, 0.01), (300.0, 0.01)])
def test_neither_large_logits_nor_a_low_temperature_round_a_small_value(beta, offset, temperature):
    student_logits_NV, _ = pair(V=2003)
    student_logits_NV = student_logits_NV.detach() + offset
    noise_NV = torch.randn(N, 2003, generator=torch.Generator().manual_seed(1))
    teacher_logits_NV = student_logits_NV + 1e-2 * temperature * noise_NV
    labels_N = torch.arange(N)
    options = {"beta": beta, "temperature": temperature}
    actual = dense_divergence(student_logits_NV, teacher_logits_NV, labels_N=labels_N, **options)
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, **options)
    # A few units of float32's rounding, not of that of logits of 300 or of logits over 0.01.
    torch.testing.assert_close(actual.values_N.double(), expected_N, rtol=1e-5, atol=5e-7)
    cross_entropy_N = functional.cross_entropy(student_logits_NV.double(), labels_N, reduction="none")
    torch.testing.assert_close(actual.cross_entropy_N.double(), cross_entropy_N, rtol=2e-7, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_tokens_give_a_zero_that_is_connected_to_the_graph(beta):
    student_logits_NV, teacher_logits_NV = pair(0, 9)
    labels_N = torch.zeros(0, dtype=torch.long)
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta, labels_N=labels_N)
    loss = result.values_N.sum() + result.cross_entropy_N.sum()
    assert loss.item() == 0
    assert gradient(loss, student_logits_NV, torch.tensor(1.0)).shape == (0, 9)


@pytest.mark.parametrize("beta", BETAS)
def test_the_same_model_gives_no_loss_and_no_gradient(beta):
    student_logits_NV, _ = pair()
    values_N = dense_divergence(student_logits_NV, student_logits_NV, beta=beta).values_N
    assert values_N.abs().max() < 2e-7
    assert gradient(values_N, student_logits_NV, torch.ones(N)).abs().max() < 1e-7


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", ["student", "teacher", "both", "each its own"])
@pytest.mark.parametrize("vocab_chunk", [3, None])
def test_masked_logits_equal_the_oracle(beta, side, vocab_chunk):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    # The first chunk of 3 is masked in whole.
    if side != "teacher":
        student_logits_NV[:3, 0:4] = -math.inf
    if side != "student":
        teacher_logits_NV[:3, slice(2, 7) if side == "each its own" else slice(0, 4)] = -math.inf
    student_logits_NV.requires_grad_()
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta, vocab_chunk=vocab_chunk)
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=beta)
    assert_values_close(result.values_N, expected_N, beta)
    assert result.is_teacher_finite_N.all()
    assert result.is_finite_N.tolist() == expected_N.isfinite().tolist()

    actual_NV = gradient(result.values_N, student_logits_NV, upstream())
    is_finite_N = expected_N.isfinite()
    # Of the finite rows alone: the oracle's gradient is NaN at the others, ours zero.
    expected_N = reference_jsd(student_logits_NV[is_finite_N], teacher_logits_NV[is_finite_N], beta=beta)
    expected_NV = gradient(expected_N, student_logits_NV, upstream()[is_finite_N])
    assert_close_in_norm(actual_NV, expected_NV, tolerance=3e-6)


def test_a_teacher_without_probability_makes_the_reverse_kl_infinite_with_a_gradient_of_zero():
    student_logits_NV, teacher_logits_NV = pair()
    teacher_logits_NV[1, 5] = -math.inf
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=1.0)
    assert result.values_N[1] == math.inf
    assert result.is_finite_N.tolist() == [True, False, True, True, True]
    gradient_NV = gradient(result.values_N, student_logits_NV, upstream())
    assert (gradient_NV[1] == 0).all()
    assert (gradient_NV[0] != 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 8e6), (torch.float64, 4e15)])
def test_logits_too_far_apart_to_compare_are_flagged_and_get_no_gradient(beta, side, dtype, largest):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair(3, dtype=dtype))
    outliers = student_logits_NV if side == "student" else teacher_logits_NV
    outliers[1, 3], outliers[2, 3] = largest, 1e30
    student_logits_NV.requires_grad_()
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta)
    assert result.is_finite_N.tolist() == [True, True, False]
    assert result.values_N.isnan().tolist() == [False, False, True]
    gradient_NV = gradient(result.values_N, student_logits_NV, upstream(3))
    assert gradient_NV[0].any()
    assert not gradient_NV[2].any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab_chunk", [7, None])
def test_flags_mark_only_rows_that_are_not_finite(beta, vocab_chunk):
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    clean = dense_divergence(*pair(), beta=beta, vocab_chunk=vocab_chunk)
    teacher_logits_NV[0, 250] = math.nan
    teacher_logits_NV[1, 3] = math.inf
    teacher_logits_NV[2] = -math.inf
    student_logits_NV[3, 9] = math.nan
    student_logits_NV.requires_grad_()
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=beta, vocab_chunk=vocab_chunk)
    assert result.is_teacher_finite_N.tolist() == [False, False, False, True, True]
    assert result.is_finite_N.tolist() == [False, False, False, False, True]
    assert not result.agrees_N[:4].any()
    assert result.values_N[4] == clean.values_N[4]
    gradient_NV = gradient(result.values_N, student_logits_NV, upstream())
    assert (gradient_NV[:4] == 0).all()
    assert gradient_NV[4].isfinite().all()
    assert (gradient_NV[4] != 0).all()


@pytest.mark.parametrize("vocab_chunk", [7, 256, None])
def test_entropies_agreement_and_acceptance_equal_plain_torch(vocab_chunk):
    student_logits_NV, teacher_logits_NV = pair(64, 31)
    student_logits_NV.data[0, 4] = -math.inf
    T = 2.0
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5, temperature=T, vocab_chunk=vocab_chunk)

    def entropy(logits_NV):
        return torch.distributions.Categorical(logits=logits_NV.double().clamp(min=-1e9) / T).entropy()

    torch.testing.assert_close(
        result.student_entropy_N.double(), entropy(student_logits_NV.detach()), rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(result.teacher_entropy_N.double(), entropy(teacher_logits_NV), rtol=2e-6, atol=2e-6)
    expected_N = student_logits_NV.argmax(1) == teacher_logits_NV.argmax(1)
    assert result.agrees_N.tolist() == expected_N.tolist()
    assert 0 < expected_N.sum() < 64
    q_NV, p_NV = ((logits_NV.detach().double() / T).softmax(1) for logits_NV in (student_logits_NV, teacher_logits_NV))
    torch.testing.assert_close(result.acceptance_N.double(), 1 - (q_NV - p_NV).abs().sum(1) / 2, rtol=2e-6, atol=2e-6)
    assert not any(
        tensor.requires_grad
        for tensor in (
            result.acceptance_N,
            result.student_entropy_N,
            result.teacher_entropy_N,
            result.agrees_N,
            result.is_finite_N,
        )
    )


def test_equal_top_logits_agree_on_the_first():
    student_logits_NV = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0]])
    teacher_logits_NV = torch.tensor([[0.0, 9.0, 1.0, 9.0, 2.0]])
    for vocab_chunk in (1, 2, 3, 5):
        result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5, vocab_chunk=vocab_chunk)
        assert result.agrees_N.tolist() == [True]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_chunk", [1, 7, None])
def test_cross_entropy_equals_torch_at_temperature_one(temperature, vocab_chunk):
    student_logits_NV, teacher_logits_NV = pair()
    labels_N = torch.tensor([0, 300, 7, 6, -100])
    result = dense_divergence(
        student_logits_NV,
        teacher_logits_NV,
        beta=0.5,
        temperature=temperature,
        labels_N=labels_N,
        vocab_chunk=vocab_chunk,
    )
    expected_N = functional.cross_entropy(student_logits_NV.double(), labels_N, reduction="none")
    torch.testing.assert_close(result.cross_entropy_N.double(), expected_N, rtol=1e-6, atol=1e-6)
    assert_close_in_norm(
        gradient(result.cross_entropy_N, student_logits_NV, upstream()),
        gradient(expected_N, student_logits_NV, upstream()),
        tolerance=3e-6,
    )


def test_a_sum_of_divergence_and_cross_entropy_has_the_sum_of_their_gradients():
    student_logits_NV, teacher_logits_NV = pair()
    labels_N = torch.tensor([0, 300, 7, 6, 12])
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.1, temperature=2.0, labels_N=labels_N)
    mixed_N = 0.7 * result.values_N - 0.2 * result.cross_entropy_N
    jsd_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=0.1, temperature=2.0)
    cross_entropy_N = functional.cross_entropy(student_logits_NV.double(), labels_N, reduction="none")
    assert_close_in_norm(
        gradient(mixed_N, student_logits_NV, upstream()),
        gradient(0.7 * jsd_N - 0.2 * cross_entropy_N, student_logits_NV, upstream()),
        tolerance=3e-6,
    )


def test_labels_outside_the_vocabulary_or_masked_have_infinite_cross_entropy_and_no_gradient():
    student_logits_NV, teacher_logits_NV = (logits_NV.detach() for logits_NV in pair())
    student_logits_NV[2, 7] = -math.inf
    student_logits_NV.requires_grad_()
    labels_N = torch.tensor([V, -1, 7, 6, 12])
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5, labels_N=labels_N)
    assert result.cross_entropy_N[:3].tolist() == [math.inf] * 3
    gradient_NV = gradient(result.cross_entropy_N, student_logits_NV, torch.ones(N))
    assert (gradient_NV[:3] == 0).all()
    assert (gradient_NV[3:] != 0).all()


def test_an_infinite_divergence_does_not_change_its_rows_cross_entropy():
    student_logits_NV, teacher_logits_NV = pair()
    teacher_logits_NV[0, 3] = math.nan
    labels_N = torch.tensor([0, 300, 7, 6, 12])
    result = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5, labels_N=labels_N)
    both_NV = gradient(result.values_N + result.cross_entropy_N, student_logits_NV, torch.ones(N))
    expected_N = functional.cross_entropy(student_logits_NV.double(), labels_N, reduction="none")
    expected_NV = gradient(expected_N, student_logits_NV, torch.ones(N))
    assert_close_in_norm(both_NV[0], expected_NV[0], tolerance=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student_logits_NV, teacher_logits_NV = pair(dtype=dtype)
    values_N = dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5, vocab_chunk=7).values_N
    expected_N = reference_jsd(student_logits_NV, teacher_logits_NV, beta=0.5)
    assert_values_close(values_N, expected_N, 0.5)
    gradient_NV = gradient(values_N, student_logits_NV, upstream())
    assert gradient_NV.dtype == dtype
    assert_close_in_norm(
        gradient_NV, gradient(expected_N, student_logits_NV, upstream()), tolerance=torch.finfo(dtype).eps
    )


def test_the_teacher_gets_no_gradient():
    student_logits_NV, teacher_logits_NV = pair()
    teacher_logits_NV.requires_grad_()
    dense_divergence(student_logits_NV, teacher_logits_NV, beta=0.5).values_N.sum().backward()
    assert student_logits_NV.grad is not None
    assert teacher_logits_NV.grad is None


class RecordNewStorages(TorchDispatchMode):
    """Record the size in elements of every tensor made that doesn't share the memory of `known`."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes = []
        self.large = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.sizes.append(storage.nbytes() // tensor.element_size())
                    self.large.setdefault(self.sizes[-1], {})[storage.data_ptr()] = tensor
        return outputs


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_logits_is_made_but_the_gradient(beta, dtype):
    N, V, vocab_chunk = 32, 1000, 64
    student_logits_NV, teacher_logits_NV = pair(N, V, dtype=dtype)
    labels_N = torch.arange(N)
    with RecordNewStorages(student_logits_NV, teacher_logits_NV) as forward:
        result = dense_divergence(
            student_logits_NV,
            teacher_logits_NV,
            beta=beta,
            temperature=2.0,
            labels_N=labels_N,
            vocab_chunk=vocab_chunk,
        )
        loss = result.values_N.sum() + result.cross_entropy_N.sum()
    rows = N * vocab_chunk // V
    assert max(forward.sizes) == rows * V
    with RecordNewStorages(student_logits_NV, teacher_logits_NV) as backward:
        torch.autograd.grad(loss, student_logits_NV)
    assert sorted(set(backward.sizes))[-2:] == [rows * V, N * V]
    assert len(backward.large[N * V]) == 1

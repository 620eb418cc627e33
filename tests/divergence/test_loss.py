"""The entry: paths, options, flags, errors. Shapes: N tokens, V vocabulary, H, G hidden widths."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_trainer.divergence import (
    generalized_jsd,
    linear_generalized_jsd,
    reference_jsd,
    token_divergence,
)
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal

N, V, H, G = 6, 23, 4, 5


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hidden_signal(width, *, seed=0, N=N, V=V, **head):
    head.setdefault("bias_V", normal(V, seed=seed + 20))
    return HiddenSignal(normal(N, width, seed=seed), Head(normal(V, width, seed=seed + 10), **head))


def logits_signal(*, seed=0, N=N, V=V):
    return LogitsSignal(2 * normal(N, V, seed=seed))


def logits_of(signal):
    head = signal.head
    logits_NV = head.scale * functional.linear(signal.hidden_NH, head.weight_VH, head.bias_V)
    return LogitsSignal(logits_NV if head.softcap is None else head.softcap * (logits_NV / head.softcap).tanh())


@pytest.mark.parametrize("student_kind", ["hidden", "logits"])
@pytest.mark.parametrize("teacher_kind", ["hidden", "logits"])
def test_every_pair_of_kinds_of_signal_gives_the_same_value_and_gradient(student_kind, teacher_kind):
    student, teacher = hidden_signal(H, softcap=4.0), hidden_signal(G, seed=1, scale=0.5)
    student.hidden_NH.requires_grad_()
    options = {"beta": 0.3, "temperature": 2.0, "labels_N": torch.arange(N)}
    expected_N = reference_jsd(logits_of(student).logits_NV, logits_of(teacher).logits_NV, beta=0.3, temperature=2.0)
    result = token_divergence(
        student if student_kind == "hidden" else logits_of(student),
        teacher if teacher_kind == "hidden" else logits_of(teacher),
        **options,
    )
    torch.testing.assert_close(result.values_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    (actual,) = torch.autograd.grad(result.values_N.sum(), student.hidden_NH)
    (expected,) = torch.autograd.grad(expected_N.sum(), student.hidden_NH)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_continuous_scale_has_the_exact_kls_as_its_limits():
    student_logits_NV, teacher_logits_NV = 2 * normal(N, V), 2 * normal(N, V, seed=1)
    student_logits_NV, teacher_logits_NV = student_logits_NV.double(), teacher_logits_NV.double()
    student_logits_NV.requires_grad_()

    def value_and_gradient(beta, scale):
        values_N = generalized_jsd(student_logits_NV, teacher_logits_NV, beta=beta, scale=scale)
        return values_N, torch.autograd.grad(values_N.sum(), student_logits_NV)[0]

    for end, near in ((0.0, 1e-8), (1.0, 1 - 1e-8)):
        for actual, expected in zip(
            value_and_gradient(near, "continuous"), value_and_gradient(end, "paper"), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        # At the ends themselves both scales are the KL.
        for actual, expected in zip(
            value_and_gradient(end, "continuous"), value_and_gradient(end, "paper"), strict=True
        ):
            assert torch.equal(actual, expected)
    for actual, expected in zip(value_and_gradient(0.3, "continuous"), value_and_gradient(0.3, "paper"), strict=True):
        torch.testing.assert_close(actual, expected / (0.3 * 0.7))
    torch.testing.assert_close(
        value_and_gradient(0.3, "continuous")[0],
        reference_jsd(student_logits_NV, teacher_logits_NV, beta=0.3, scale="continuous"),
    )


def test_the_paper_scale_vanishes_towards_the_ends():
    student_logits_NV, teacher_logits_NV = normal(N, V).double(), normal(N, V, seed=1).double()

    def value(beta):
        return generalized_jsd(student_logits_NV, teacher_logits_NV, beta=beta)

    torch.testing.assert_close(value(1e-7) / 1e-7, value(0.0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(value(1 - 1e-7) / 1e-7, value(1.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_generalized_jsd_equals_generalized_jsd_of_the_logits(dtype):
    student_hidden_NH, student_weight_VH = normal(N, H, dtype=dtype), normal(V, H, seed=1, dtype=dtype)
    teacher_hidden_NG, teacher_weight_VG = normal(N, G, seed=2, dtype=dtype), normal(V, G, seed=3, dtype=dtype)
    student_bias, teacher_bias = normal(V, seed=4, dtype=dtype), normal(V, seed=5, dtype=dtype)
    actual_N = linear_generalized_jsd(
        student_hidden_NH,
        student_weight_VH,
        teacher_hidden_NG,
        teacher_weight_VG,
        beta=0.3,
        temperature=2.0,
        scale="continuous",
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        student_logit_scale=0.5,
        teacher_logit_scale=2.0,
        student_softcap=3.0,
        teacher_softcap=4.0,
        token_block=4,
    )
    student_logits_NV = functional.linear(student_hidden_NH.double(), student_weight_VH.double(), student_bias.double())
    teacher_logits_NV = functional.linear(teacher_hidden_NG.double(), teacher_weight_VG.double(), teacher_bias.double())
    expected_N = reference_jsd(
        3 * (0.5 * student_logits_NV / 3).tanh(),
        4 * (2.0 * teacher_logits_NV / 4).tanh(),
        beta=0.3,
        temperature=2.0,
        scale="continuous",
    )
    assert actual_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=1e-5)


def test_without_labels_there_is_no_cross_entropy():
    assert token_divergence(logits_signal(), logits_signal(seed=1), beta=0.5).cross_entropy_N is None


def test_a_result_is_frozen():
    result = token_divergence(logits_signal(), logits_signal(seed=1), beta=0.5)
    with pytest.raises(FrozenInstanceError):
        result.values_N = None


class RefuseHostSynchronisation(TorchDispatchMode):
    """Raise on whatever would make the host wait for values on a device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")):
            raise AssertionError(f"{name} waits for the device")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [hidden_signal, logits_signal])
def test_no_value_is_read_on_the_host_forward_or_backward(beta, kind):
    widths = ((H,), (G,)) if kind is hidden_signal else ((), ())
    student, teacher = kind(*widths[0]), kind(*widths[1], seed=1)
    leaf = student.hidden_NH if kind is hidden_signal else student.logits_NV
    leaf.requires_grad_()
    with RefuseHostSynchronisation():
        result = token_divergence(student, teacher, beta=beta, temperature=2.0, labels_N=torch.arange(N))
        (result.values_N.sum() + result.cross_entropy_N.sum()).backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_value_in_a_tensor_raises(value, beta):
    broken = LogitsSignal(torch.full((N, V), value))
    labels_N = torch.tensor([-100, -1, V, 10**12, -(10**12), 0])
    for student, teacher in ((broken, logits_signal()), (logits_signal(), broken), (broken, broken)):
        result = token_divergence(student, teacher, beta=beta, labels_N=labels_N)
        assert not result.is_finite_N.any()
        assert result.is_teacher_finite_N.all() == (teacher is not broken)


def test_logits_are_compared_in_float32_under_autocast():
    student, teacher = logits_signal(), logits_signal(seed=1)
    expected = token_divergence(student, teacher, beta=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = token_divergence(student, teacher, beta=0.5)
    assert torch.equal(actual.values_N, expected.values_N)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta must be in \[0, 1\] \(0 is forward KL, 1 is reverse KL\); got 1.5"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\].*got -0.1"),
        ({"beta": math.nan}, r"beta must be in \[0, 1\].*got nan"),
        ({"temperature": 0.0}, r"temperature must be above 0 and finite.*got 0.0"),
        ({"temperature": math.inf}, r"temperature must be above 0 and finite.*got inf"),
        ({"scale": "sum"}, r"scale must be one of 'paper', 'continuous'; got 'sum'"),
        ({"vocab_chunk": 0}, r"vocab_chunk must be at least 1.*got 0"),
        ({"product_dtype": torch.float64}, r"product_dtype must be None, torch.float32.*got torch.float64"),
        ({"token_block": -1}, r"token_block must be at least 1.*got -1"),
        ({"labels_N": torch.zeros(N + 1, dtype=torch.long)}, r"labels_N must be an int64.*\[6\]; got .*\[7\]"),
        ({"labels_N": torch.zeros(N)}, r"labels_N must be an int64 tensor.*got torch.float32"),
        ({"labels_N": torch.zeros(N, dtype=torch.int32)}, r"labels_N must be an int64 tensor.*got torch.int32"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        token_divergence(logits_signal(), logits_signal(seed=1), **{"beta": 0.5, **options})


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (logits_signal(), logits_signal(V=30), r"got 23 tokens for the student and 30 .*slice both"),
        (logits_signal(), hidden_signal(G, V=30), r"got 23 tokens for the student and 30 .*slice both"),
        (logits_signal(N=5), logits_signal(), r"N = 5 for the student and N = 6"),
        (hidden_signal(H, N=5), hidden_signal(G), r"N = 5 for the student and N = 6"),
        (logits_signal(V=0), logits_signal(V=0), r"at least one token"),
        (LogitsSignal(torch.zeros(2, 3, V)), logits_signal(), r"student logits .*\[N, V\].*got .*\[2, 3, 23\]"),
        (logits_signal(), LogitsSignal(torch.zeros(N, V).long()), r"teacher logits must be a float.*int64"),
        (
            HiddenSignal(torch.zeros(2, 3, H), Head(torch.zeros(V, H))),
            logits_signal(),
            r"student hidden states .*\[N, H\].*got .*\[2, 3, 4\]",
        ),
        (
            HiddenSignal(torch.zeros(N, H), Head(torch.zeros(V, G))),
            logits_signal(),
            r"student's hidden states and head weight .*got \[6, 4\] and \[23, 5\]",
        ),
        (
            logits_signal(),
            HiddenSignal(torch.zeros(N, G), Head(torch.zeros(V, G), torch.zeros(V + 1))),
            r"teacher's head bias must have the shape \[23\].*got \[24\]",
        ),
        (
            HiddenSignal(torch.zeros(N, H), Head(torch.zeros(V, H), softcap=0.0)),
            logits_signal(),
            r"student's softcap must be positive.*got 0.0",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(student, teacher, message):
    with pytest.raises(GKDConfigError, match=message):
        token_divergence(student, teacher, beta=0.5)


def test_importing_needs_only_torch():
    code = (
        "import sys, gkd_trainer.divergence\n"
        "print([name for name in ('transformers', 'trl', 'datasets', 'accelerate') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"

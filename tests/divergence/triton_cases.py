"""The Triton kernels against the float64 oracle: on a GPU, or in Triton's interpreter (run by test_triton.py).

Shapes: R rows, V vocabulary.
"""

import math

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import reference_jsd, triton
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.options import checked_objective
from gkd_trainer.divergence.rows import LogitsComparison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R = 5


def pair(V, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student_RV = 3 * torch.randn(R, V, generator=generator)
    return student_RV, student_RV + 2 * torch.randn(R, V, generator=generator)


def compare(student_RV, teacher_RV, objective, *, labels_R=None, value_weight_R=None, label_weight_R=None, **options):
    """Return the fields by name, and the student's rows after the comparison."""
    softcap = options.get("softcap")
    rows_RV = student_RV.to(DEVICE, copy=True)
    result = triton.compare_rows(
        rows_RV,
        teacher_RV.to(DEVICE),
        *(None if tensor is None else tensor.to(DEVICE) for tensor in (labels_R, value_weight_R, label_weight_R)),
        objective.numbers(softcap),
        kind=objective.kind,
        is_tempered=objective.temperature != 1,
        is_capped=softcap is not None,
        chunk=64,
    )
    return {name: None if field is None else field.cpu() for name, field in vars(result).items()}, rows_RV.cpu()


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("V", [1, 7, 150])
def test_values_and_gradient_equal_the_oracle(beta, temperature, V):
    student_RV, teacher_RV = pair(V)
    labels_R = torch.tensor([0, V - 1, 0, V // 2, -100])
    value_weight_R, label_weight_R = torch.linspace(-1, 2, R), torch.linspace(2, -1, R)
    fields, gradient_RV = compare(
        student_RV,
        teacher_RV,
        Objective(beta=beta, temperature=temperature),
        labels_R=labels_R,
        value_weight_R=value_weight_R,
        label_weight_R=label_weight_R,
    )
    student_RV.requires_grad_()
    expected_R = reference_jsd(student_RV, teacher_RV, beta=beta, temperature=temperature)
    cross_entropy_R = functional.cross_entropy(student_RV.double(), labels_R, reduction="none")
    torch.testing.assert_close(fields["values_N"].double(), expected_R, rtol=1e-5, atol=2e-6 * (beta * (1 - beta) or 1))
    torch.testing.assert_close(fields["cross_entropy_N"].double(), cross_entropy_R, rtol=1e-5, atol=1e-6)
    (expected_RV,) = torch.autograd.grad(
        (value_weight_R * expected_R + label_weight_R * cross_entropy_R).sum(), student_RV
    )
    if V > 1:
        assert_close_in_norm(gradient_RV, expected_RV.double(), tolerance=5e-6)
    else:
        assert gradient_RV.abs().max() < 1e-6


@pytest.mark.parametrize("sigma", [1.0, 0.03])
def test_the_gradient_is_right_where_teacher_and_student_are_close(sigma):
    student_RV, _ = pair(150)
    teacher_RV = student_RV + sigma * torch.randn(R, 150, generator=torch.Generator().manual_seed(1))
    _, gradient_RV = compare(student_RV, teacher_RV, Objective(beta=0.5), value_weight_R=torch.ones(R))
    student_RV.requires_grad_()
    expected_R = reference_jsd(student_RV, teacher_RV, beta=0.5)
    (expected_RV,) = torch.autograd.grad(expected_R.sum(), student_RV)
    assert_close_in_norm(gradient_RV, expected_RV.double(), tolerance=3e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_every_field_equals_that_of_plain_torch_on_broken_rows_too(beta, softcap):
    student_RV, teacher_RV = pair(150)
    student_RV[0, 2:70] = teacher_RV[0, 2:70] = -math.inf
    teacher_RV[1, 3], teacher_RV[2], student_RV[3, 1] = math.nan, -math.inf, math.inf
    objective = Objective(beta=beta, temperature=2.0)
    weights = {
        "labels_R": torch.tensor([2, 149, 150, 4, -1]),
        "value_weight_R": torch.linspace(-1, 2, R),
        "label_weight_R": torch.linspace(2, -1, R),
    }
    if softcap is not None:
        student_RV = student_RV.clamp(-20, 20)
    actual, gradient_RV = compare(student_RV, teacher_RV, objective, softcap=softcap, **weights)
    labels_R = weights.pop("labels_R")
    expected = LogitsComparison(objective, softcap)(student_RV, (teacher_RV,), labels_R, **weights)
    for name, expected_R in vars(expected).items():
        torch.testing.assert_close(actual[name], expected_R, rtol=1e-5, atol=2e-6, equal_nan=True, msg=name)
    torch.testing.assert_close(gradient_RV, student_RV, rtol=2e-5, atol=2e-6)


def test_without_weights_the_logits_stay_as_they_are():
    student_RV, teacher_RV = pair(150)
    fields, rows_RV = compare(student_RV, teacher_RV, Objective(beta=0.5))
    assert torch.equal(rows_RV, student_RV)
    assert fields["cross_entropy_N"] is None


def test_rows_of_a_wider_tensor_are_read_and_written_at_their_stride():
    student_RV, teacher_RV = pair(150)
    wide_RV = torch.zeros(R, 200)
    wide_RV[:, :150] = student_RV
    wide_RV = wide_RV.to(DEVICE)
    arguments = (torch.ones(R, device=DEVICE), None, Objective(beta=0.5).numbers(None))
    options = {"kind": "jsd", "is_tempered": False, "is_capped": False}
    triton.compare_rows(wide_RV[:, :150], teacher_RV.to(DEVICE), None, *arguments, **options)
    _, expected_RV = compare(student_RV, teacher_RV, Objective(beta=0.5), value_weight_R=torch.ones(R))
    torch.testing.assert_close(wide_RV[:, :150].cpu(), expected_RV)
    assert (wide_RV[:, 150:] == 0).all()


@pytest.mark.parametrize("kind", sorted(triton.KINDS - {"forward_kl", "reverse_kl", "jsd"}))
def test_the_other_divergences_equal_plain_torch(kind):
    student_RV, teacher_RV = pair(150)
    student_RV[0, :9] = teacher_RV[0, 3:20] = -math.inf
    objective = checked_objective(kind)
    actual, gradient_RV = compare(student_RV, teacher_RV, objective, value_weight_R=torch.ones(R))
    expected = LogitsComparison(objective)(student_RV, (teacher_RV,), value_weight_R=torch.ones(R))
    torch.testing.assert_close(actual["values_N"], expected.values_N, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient_RV, student_RV, rtol=2e-5, atol=2e-6)


class _OnDevice:
    """Stands in for `torch.cuda.device_of`, which does nothing to tensors of the CPU; knows where it is entered."""

    current = None

    def __init__(self, tensor):
        self.tensor = tensor

    def __enter__(self):
        _OnDevice.current = self.tensor.device

    def __exit__(self, *error):
        _OnDevice.current = None


def test_the_kernel_is_launched_on_the_device_of_its_rows(monkeypatch):
    seen = []
    launch = triton._compare_kernel

    class Kernel:
        def __getitem__(self, grid):
            seen.append(_OnDevice.current)
            return launch[grid]

    monkeypatch.setattr(torch.cuda, "device_of", _OnDevice)
    monkeypatch.setattr(triton, "_compare_kernel", Kernel())
    student_RV, teacher_RV = pair(7)
    compare(student_RV, teacher_RV, Objective(beta=0.5))
    assert seen == [student_RV.to(DEVICE).device]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_rows_on_another_device_than_the_current_one_are_compared_there():
    student_RV, teacher_RV = pair(150)
    expected = LogitsComparison(Objective(beta=0.5))(student_RV, (teacher_RV,), value_weight_R=torch.ones(R))
    student_on_1_RV, teacher_on_1_RV = (tensor.to("cuda:1") for tensor in pair(150))
    weight_R = torch.ones(R, device="cuda:1")
    with torch.cuda.device(0):
        actual = LogitsComparison(Objective(beta=0.5))(student_on_1_RV, (teacher_on_1_RV,), value_weight_R=weight_R)
    torch.testing.assert_close(actual.values_N.cpu(), expected.values_N)
    torch.testing.assert_close(student_on_1_RV.cpu(), student_RV, rtol=2e-5, atol=2e-6)

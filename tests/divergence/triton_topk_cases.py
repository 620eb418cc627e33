"""The Triton kernels of top-k against the float64 oracle: on a GPU, or in Triton's interpreter (test_triton_topk.py).

Shapes: R rows, V vocabulary, K top tokens of the teacher.
"""

import math
import os

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import reference_topk_jsd, rows, token_divergence, topk, triton_topk
from gkd_trainer.divergence.objective import DIVERGENCES, Objective
from gkd_trainer.divergence.options import checked_objective
from gkd_trainer.divergence.topk import TopKComparison, has_topk_kernels
from gkd_trainer.signals import Head, HiddenSignal, SummedSignal, TopKSignal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEFAULT_CHUNK = triton_topk.CHUNK
TAILS = ("bucket", "renormalize")
R = 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Walk along a row in several steps."""
    monkeypatch.setattr(triton_topk, "CHUNK", 64)


def pair(R, V, K, *, sigma=2.0, seed=0):
    """Return logits of a student, and a teacher's ids and log-probs, in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    student_RV = 3 * torch.randn(R, V, generator=generator)
    teacher_RV = student_RV + sigma * torch.randn(R, V, generator=generator)
    top_RK = teacher_RV.log_softmax(dim=1).topk(K, dim=1)
    order_K = torch.randperm(K, generator=generator)
    return student_RV, (top_RK.indices[:, order_K], top_RK.values[:, order_K])


def of_weights(R, V):
    labels_R = torch.arange(R) * (V - 1) // max(1, R - 1)
    labels_R[R // 2] = -100
    return {
        "labels_R": labels_R,
        "value_weight_R": torch.linspace(-1, 2, R),
        "label_weight_R": torch.linspace(2, -1, R),
    }


def compare(student_RV, teacher, objective, *, engine="triton", tail="bucket", softcap=None, **weights):
    """Return the fields by name, and the student's rows after the comparison."""
    rows_RV = student_RV.to(DEVICE, copy=True)
    labels_R, value_weight_R, label_weight_R = (
        None if weights.get(name) is None else weights[name].to(DEVICE)
        for name in ("labels_R", "value_weight_R", "label_weight_R")
    )
    previous, rows._engine = rows._engine, engine
    try:
        result = TopKComparison(objective, tail, softcap)(
            rows_RV,
            tuple(tensor.to(DEVICE) for tensor in teacher),
            labels_R,
            value_weight_R=value_weight_R,
            label_weight_R=label_weight_R,
        )
    finally:
        rows._engine = previous
    return {name: None if field is None else field.cpu() for name, field in vars(result).items()}, rows_RV.cpu()


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_equal_to_the_oracle(student_RV, teacher, *, beta, tail, tolerance=2e-5):
    """Compare values, cross entropy, and the gradient of their weighted sum."""
    weights = of_weights(*student_RV.shape)
    fields, gradient_RV = compare(student_RV, teacher, Objective(beta=beta), tail=tail, **weights)
    student_RV = student_RV.double().requires_grad_()
    expected_R = reference_topk_jsd(student_RV, *teacher, beta=beta, tail=tail)
    cross_entropy_R = functional.cross_entropy(student_RV, weights["labels_R"], reduction="none")
    torch.testing.assert_close(fields["values_N"].double(), expected_R, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(fields["cross_entropy_N"].double(), cross_entropy_R, rtol=1e-5, atol=1e-6)
    loss = (weights["value_weight_R"] * expected_R + weights["label_weight_R"] * cross_entropy_R).sum()
    (expected_RV,) = torch.autograd.grad(loss, student_RV)
    if expected_RV.norm() < 1e-9:  # one token, or one entry whose mass is renormalised
        assert gradient_RV.abs().max() < 1e-6
    else:
        assert_close_in_norm(gradient_RV, expected_RV, tolerance=tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("V", "K"), [(1, 1), (17, 17), (150, 5)])
def test_values_and_gradient_equal_the_oracle(beta, tail, V, K):
    assert_equal_to_the_oracle(*pair(R, V, K), beta=beta, tail=tail)


def test_one_row_equals_the_oracle():
    assert_equal_to_the_oracle(*pair(1, 131, 7), beta=0.5, tail="bucket")


@pytest.mark.parametrize("V", [151_665, 151_936, 262_144])
def test_a_large_vocabulary_equals_the_oracle_in_chunks_of_the_default_size(monkeypatch, V):
    monkeypatch.setattr(triton_topk, "CHUNK", DEFAULT_CHUNK)
    assert_equal_to_the_oracle(*pair(2, V, 21), beta=0.5, tail="bucket")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_right_where_teacher_and_student_are_close(beta):
    student_RV, teacher = pair(R, 1031, 33, sigma=0.03)
    _, gradient_RV = compare(student_RV, teacher, Objective(beta=beta), value_weight_R=torch.ones(R))
    student_RV.requires_grad_()
    expected_R = reference_topk_jsd(student_RV, *teacher, beta=beta)
    assert_close_in_norm(gradient_RV, torch.autograd.grad(expected_R.sum(), student_RV)[0], tolerance=1e-3)


@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_logits_far_from_zero_are_compared_as_precisely(offset):
    student_RV, teacher = pair(R, 131, 5, sigma=0.1)
    student_RV = student_RV + offset
    _, gradient_RV = compare(student_RV, teacher, Objective(beta=0.5), value_weight_R=torch.ones(R))
    student_RV.requires_grad_()
    expected_R = reference_topk_jsd(student_RV, *teacher, beta=0.5)
    assert_close_in_norm(gradient_RV, torch.autograd.grad(expected_R.sum(), student_RV)[0], tolerance=1e-4)


def broken_pair():
    """Rows 0 to 5 of the teacher and 6 to 10 of the student are not finite; the others have unusual entries."""
    student_RV, (ids_RK, log_p_RK) = pair(17, 150, 5)
    log_p_RK[0, 1], log_p_RK[1, 2], log_p_RK[2] = math.nan, math.inf, 0.0
    log_p_RK[3], ids_RK[4, 3], ids_RK[5, 0] = math.log(0.3), 150, -1
    is_outside_RV = torch.ones(17, 150, dtype=torch.bool).scatter(1, ids_RK.clamp(0, 149), False)
    student_RV[6, is_outside_RV[6].nonzero()[3]] = math.nan
    student_RV[7, is_outside_RV[7].nonzero()[90]] = math.inf
    student_RV[8, ids_RK[8, 2]], student_RV[9, ids_RK[9, 4]], student_RV[10] = math.inf, math.nan, -math.inf
    # Missing entries, whose ids mean nothing.
    log_p_RK[11, :2], ids_RK[11, :2] = -math.inf, torch.tensor([-7, 2**40])
    log_p_RK[12, 0], ids_RK[12, 0] = -math.inf, ids_RK[12, 1]
    # No entry; nothing but the entries; an entry of probability zero; a large part of the vocabulary masked.
    log_p_RK[16] = -math.inf
    student_RV[13, is_outside_RV[13]] = -math.inf
    student_RV[14, ids_RK[14, 1]] = -math.inf
    student_RV[15, :70] = -math.inf
    return student_RV, (ids_RK, log_p_RK)


@pytest.mark.parametrize(
    ("beta", "tail", "softcap"),
    [
        (0.0, "bucket", None),
        (0.5, "bucket", None),
        (1.0, "bucket", 30.0),
        (0.0, "renormalize", 30.0),
        (0.5, "renormalize", None),
    ],
)
def test_every_field_equals_that_of_plain_torch_on_broken_rows_too(beta, tail, softcap):
    student_RV, teacher = broken_pair()
    if softcap is not None:
        student_RV = student_RV.clamp(-20, 20)  # NaN stays NaN
    labels_R = torch.tensor([2, 149, 150, 4, -1, -100, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    weights = {**of_weights(17, 150), "labels_R": labels_R}
    options = {"tail": tail, "softcap": softcap, **weights}
    expected, expected_RV = compare(student_RV, teacher, Objective(beta=beta), engine="eager", **options)
    actual, gradient_RV = compare(student_RV, teacher, Objective(beta=beta), **options)
    assert expected["is_teacher_finite_N"].tolist() == [row >= 6 for row in range(17)]
    assert expected["is_finite_N"][6:11].tolist() == (
        [False] * 5 if softcap is None else [False, True, True, False, True]
    )
    for name, expected_R in expected.items():
        torch.testing.assert_close(actual[name], expected_R, rtol=1e-5, atol=3e-6, equal_nan=True, msg=name)
    torch.testing.assert_close(gradient_RV, expected_RV, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence_equals_plain_torch_also_one_without_a_kernel_of_its_own(monkeypatch, name):
    student_RV, teacher = pair(R, 150, 9)
    options = of_weights(R, 150)
    expected, expected_RV = compare(student_RV, teacher, checked_objective(name), engine="eager", **options)
    monkeypatch.setattr(topk, "has_topk_kernels", lambda *tensors: True)
    # The categories are compared by what suits them.
    actual, gradient_RV = compare(student_RV, teacher, checked_objective(name), engine=None, **options)
    torch.testing.assert_close(actual["values_N"], expected["values_N"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient_RV, expected_RV, rtol=2e-5, atol=2e-6)


def test_tied_top_tokens_agree_if_one_of_them_is_shared():
    student_RV, ids_RK = torch.zeros(3, 90), torch.tensor([[70, 3], [70, 3], [70, 3]])
    student_RV[0, [3, 8]] = student_RV[1, [8, 9]] = student_RV[2, 70] = 2.0
    log_p_RK = torch.tensor([[0.4, 0.4], [0.4, 0.4], [0.3, 0.5]]).log()
    fields, _ = compare(student_RV, (ids_RK, log_p_RK), Objective(beta=0.5))
    assert fields["agrees_N"].tolist() == [True, False, False]


def test_without_weights_the_logits_stay_as_they_are():
    student_RV, teacher = pair(R, 150, 5)
    fields, rows_RV = compare(student_RV, teacher, Objective(beta=0.5))
    assert torch.equal(rows_RV, student_RV)
    assert fields["cross_entropy_N"] is None


def test_no_rows_have_empty_fields():
    student_RV, teacher = pair(0, 150, 5)
    none_R = torch.zeros(0)
    weights = {"labels_R": none_R.long(), "value_weight_R": none_R, "label_weight_R": none_R}
    fields, gradient_RV = compare(student_RV, teacher, Objective(beta=0.5), **weights)
    assert gradient_RV.shape == (0, 150)
    assert all(field is None or field.shape == (0,) for field in fields.values())


def test_rows_that_are_all_masked_have_no_gradient():
    student_RV, teacher = pair(R, 150, 5)
    fields, gradient_RV = compare(
        student_RV,
        teacher,
        Objective(beta=0.5),
        labels_R=torch.full((R,), -100),
        value_weight_R=torch.zeros(R),
        label_weight_R=torch.ones(R),
    )
    assert (gradient_RV == 0).all()
    assert (fields["cross_entropy_N"] == 0).all()


def test_repeats_are_equal_to_the_bit():
    student_RV, teacher = pair(R, 300, 33)
    fields, gradient_RV = compare(student_RV, teacher, Objective(beta=0.5), **of_weights(R, 300))
    for _ in range(2):
        again, gradient_again_RV = compare(student_RV, teacher, Objective(beta=0.5), **of_weights(R, 300))
        assert torch.equal(gradient_again_RV, gradient_RV)
        assert all(torch.equal(again[name], field) for name, field in fields.items() if field is not None)


def test_rows_of_a_padded_vocabulary_are_read_and_written_at_their_stride():
    student_RV, teacher = pair(R, 150, 5)
    wide_RV = torch.full((R, 200), math.nan, device=DEVICE)
    wide_RV[:, :150] = student_RV.to(DEVICE)
    reduced = triton_topk.categories(
        wide_RV[:, :150], *(tensor.to(DEVICE) for tensor in teacher), None, has_bucket=True, max_mass=1.001
    )
    slope_RC = torch.randn(R, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alone_RV = student_RV.to(DEVICE, copy=True)
    for rows_RV in (wide_RV[:, :150], alone_RV):
        triton_topk.write_gradient(rows_RV, slope_RC, reduced, None, None, softcap=None)
    assert torch.equal(wide_RV[:, :150], alone_RV)
    assert wide_RV[:, 150:].isnan().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [63, 64, 301])
def test_a_gradient_of_half_precision_is_the_rounded_one_at_the_start_of_each_row(half, V):
    student_RV, (ids_RK, log_p_RK) = pair(R, V, 9)
    weights = {name: tensor.to(DEVICE) for name, tensor in of_weights(R, V).items()}
    rows_RV, rounded_RV = student_RV.to(DEVICE, copy=True), student_RV.to(DEVICE, copy=True)
    reduced = triton_topk.categories(
        rows_RV, ids_RK.to(DEVICE), log_p_RK.to(DEVICE), weights["labels_R"], has_bucket=True, max_mass=1.001
    )
    slope_RC = torch.randn(R, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = (slope_RC, reduced, weights["labels_R"], weights["label_weight_R"])
    triton_topk.write_gradient(rows_RV, *arguments, softcap=30.0)
    triton_topk.write_gradient(rounded_RV, *arguments, softcap=30.0, half=half)
    # A unit in the last place, not half of one: the interpreter rounds to bfloat16 towards zero.
    eps = torch.finfo(half).eps
    torch.testing.assert_close(rounded_RV.view(half)[:, :V].float(), rows_RV, rtol=eps, atol=1e-7)


def test_a_slope_beyond_the_range_of_float16_is_cut():
    student_RV, (ids_RK, log_p_RK) = pair(R, 64, 9)
    rows_RV, rounded_RV = student_RV.to(DEVICE, copy=True), student_RV.to(DEVICE, copy=True)
    teacher = ids_RK.to(DEVICE), log_p_RK.to(DEVICE)
    reduced = triton_topk.categories(rows_RV, *teacher, None, has_bucket=True, max_mass=1.001)
    slope_RC = torch.full((R, 10), 1e6, device=DEVICE)
    triton_topk.write_gradient(rows_RV, slope_RC, reduced, None, None, softcap=None)
    triton_topk.write_gradient(rounded_RV, slope_RC, reduced, None, None, softcap=None, half=torch.float16)
    limit = torch.finfo(torch.float16).max
    assert rows_RV.max() > limit
    found_RV = rounded_RV.view(torch.float16)[:, :64].float()
    torch.testing.assert_close(found_RV, rows_RV.clamp(-limit, limit), rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("terms", [1, 2])
def test_hidden_states_with_products_of_halves_have_a_gradient_right_to_a_percent(monkeypatch, terms):
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = torch.randn(21, 16, generator=generator), torch.randn(131, 16, generator=generator)
    _, (ids_NK, log_p_NK) = pair(21, 131, 7)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden_NH, weight_VH)]
    student = HiddenSignal(leaves[0], Head(leaves[1]))
    teacher = TopKSignal(ids_NK.to(DEVICE), log_p_NK.to(DEVICE), 131)
    monkeypatch.setattr(rows, "_engine", "triton")
    stored = []
    write = triton_topk.write_gradient
    monkeypatch.setattr(
        triton_topk,
        "write_gradient",
        lambda *args, half, **options: (stored.append(half), write(*args, half=half, **options)),
    )
    signal = teacher if terms == 1 else SummedSignal((teacher, teacher), (0.25, 0.75))
    values_N = token_divergence(student, signal, beta=0.5, product_dtype=torch.bfloat16, token_block=8).values_N
    gradients = torch.autograd.grad(values_N.sum(), leaves)
    # The kernel rounds where its gradient is the one that the products take.
    assert set(stored) == {torch.bfloat16 if terms == 1 else None}
    doubles = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    expected_N = reference_topk_jsd(doubles[0] @ doubles[1].T, ids_NK, log_p_NK, beta=0.5)
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_N.sum(), doubles), strict=True):
        assert_close_in_norm(gradient.cpu(), expected, tolerance=1e-2)


def test_rows_beyond_two_to_the_31_elements_are_read_and_written(monkeypatch):
    if IN_INTERPRETER:
        # It copies arguments from the CPU to the CPU and back, which would touch all of the memory.
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *arguments: None)
    student_RV, (ids_RK, log_p_RK) = pair(3, 150, 5)
    expected_RV = student_RV.to(DEVICE, copy=True)
    # Only three rows of these 8 GiB are ever touched. Their stride fits into 32 bits, or Triton would take 64 for it.
    far_RV = torch.empty(2**31 + 200, device=DEVICE).as_strided((3, 150), (2**30 + 8, 1))
    far_RV.copy_(student_RV)
    slope_RC = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    both = []
    for rows_RV in (far_RV, expected_RV):
        reduced = triton_topk.categories(
            rows_RV, ids_RK.to(DEVICE), log_p_RK.to(DEVICE), None, has_bucket=True, max_mass=1.001
        )
        triton_topk.write_gradient(rows_RV, slope_RC, reduced, None, None, softcap=None)
        both.append(reduced)
    assert torch.equal(far_RV, expected_RV)
    assert all(torch.equal(far, near) for far, near in zip(*both, strict=True) if far is not None)


class OnDevice:
    """Stands in for `torch.cuda.device_of`, which does nothing to tensors of the CPU; knows where it is entered."""

    current = None

    def __init__(self, tensor):
        self.tensor = tensor

    def __enter__(self):
        OnDevice.current = self.tensor.device

    def __exit__(self, *error):
        OnDevice.current = None


def test_the_kernels_are_launched_on_the_device_of_their_rows(monkeypatch):
    seen = []

    class Kernel:
        def __init__(self, launch):
            self.launch = launch

        def __getitem__(self, grid):
            seen.append(OnDevice.current)
            return self.launch[grid]

    for name in ("_categories_kernel", "_gradient_kernel"):
        monkeypatch.setattr(triton_topk, name, Kernel(getattr(triton_topk, name)))
    monkeypatch.setattr(torch.cuda, "device_of", OnDevice)
    student_RV, teacher = pair(R, 7, 3)
    compare(student_RV, teacher, Objective(beta=0.5), value_weight_R=torch.ones(R))
    assert seen == [student_RV.to(DEVICE).device] * 2


def test_float64_and_more_entries_than_fit_into_registers_keep_to_plain_torch(monkeypatch):
    monkeypatch.setattr(rows, "_engine", "triton")
    student_RV, (ids_RK, log_p_RK) = pair(2, 1500, 1025)
    assert has_topk_kernels(student_RV, ids_RK[:, 1:], log_p_RK[:, 1:])
    assert not has_topk_kernels(student_RV, ids_RK, log_p_RK)
    assert not has_topk_kernels(student_RV, ids_RK[:, 1:], log_p_RK[:, 1:].double())

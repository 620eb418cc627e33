"""The Triton kernels against the float64 oracle: on a GPU, or in Triton's interpreter (run by test_triton.py).

Shapes: R rows, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from torch.nn import functional
from triton import jit

from gkd_trainer.divergence import linear, reference_divergence, reference_jsd, rows, token_divergence, triton
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.options import checked_objective
from gkd_trainer.divergence.rows import LogitsComparison, gradient_of
from gkd_trainer.divergence.workspace import plan_for
from gkd_trainer.signals import Head, HiddenSignal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R = 5


# Qwen2.5's tokens, its heads' rows, and Gemma's tokens, of which the kernel's chunk divides only the last.
VOCABULARIES = [151_665, 151_936, 262_144]


def pair(V, *, R=R, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student_RV = 3 * torch.randn(R, V, generator=generator)
    return student_RV, student_RV + 2 * torch.randn(R, V, generator=generator)


def compare(student_RV, teacher_RV, objective, *, labels_R=None, value_weight_R=None, label_weight_R=None, **options):
    """Return the fields by name, and the student's rows, or the gradient, after the comparison."""
    softcap, half = options.get("softcap"), options.get("half")
    rows_RV = student_RV.to(DEVICE, copy=True)
    result = triton.compare_rows(
        rows_RV,
        teacher_RV.to(DEVICE),
        *(None if tensor is None else tensor.to(DEVICE) for tensor in (labels_R, value_weight_R, label_weight_R)),
        objective.numbers(softcap),
        kind=objective.kind,
        is_tempered=objective.temperature != 1,
        is_capped=softcap is not None,
        half=half,
        chunk=options.get("chunk", 64),
    )
    gradient_RV = gradient_of(rows_RV, half)
    return {name: None if field is None else field.cpu() for name, field in vars(result).items()}, gradient_RV.cpu()


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


@pytest.mark.parametrize(
    ("V", "beta", "temperature"),
    [
        *((V, 0.5, 1.0) for V in VOCABULARIES),
        (VOCABULARIES[0], 0.0, 2.0),
        (VOCABULARIES[0], 1.0, 1.0),
        (2048, 0.5, 1.0),
    ],
)
def test_rows_of_the_largest_vocabularies_equal_the_oracle_in_chunks_of_the_default_size(V, beta, temperature):
    student_RV, teacher_RV = pair(V, R=1)
    student_RV[0, 5], teacher_RV[0, 7] = 14.0, 14.0  # a token with mass, as in a model's predictions
    objective = Objective(beta=beta, temperature=temperature)
    fields, gradient_RV = compare(
        student_RV,
        teacher_RV,
        objective,
        value_weight_R=torch.ones(1),
        labels_R=torch.tensor([V - 1]),
        chunk=triton.CHUNK,
    )
    student_RV.requires_grad_()
    expected_R = reference_jsd(student_RV, teacher_RV, beta=beta, temperature=temperature)
    (expected_RV,) = torch.autograd.grad(expected_R.sum(), student_RV)
    cross_entropy_R = functional.cross_entropy(student_RV.double(), torch.tensor([V - 1]), reduction="none")
    torch.testing.assert_close(fields["values_N"].double(), expected_R, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fields["cross_entropy_N"].double(), cross_entropy_R, rtol=1e-6, atol=1e-6)
    assert_close_in_norm(gradient_RV, expected_RV.double(), tolerance=5e-6)
    q_V = (student_RV.double() / temperature).softmax(dim=1)
    entropy_R = torch.special.entr(q_V).sum(dim=1)
    torch.testing.assert_close(fields["student_entropy_N"].double(), entropy_R, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(triton.KINDS))
def test_a_repeat_gives_the_same_bits(kind):
    student_RV, teacher_RV = pair(5000, R=2)
    inputs = {"value_weight_R": torch.ones(2), "labels_R": torch.tensor([3, 4]), "label_weight_R": torch.ones(2)}
    objective = {"forward_kl": Objective(beta=0.0), "reverse_kl": Objective(beta=1.0)}.get(kind)
    objective = objective or checked_objective(kind)
    first, again = (compare(student_RV, teacher_RV, objective, **inputs, chunk=triton.CHUNK) for _ in range(2))
    assert torch.equal(first[1], again[1])
    for name, field in first[0].items():
        assert field is None or torch.equal(field, again[0][name]), name


def test_no_rows_give_no_values():
    student_RV, teacher_RV = pair(150, R=0)
    fields, gradient_RV = compare(student_RV, teacher_RV, Objective(), value_weight_R=torch.ones(0))
    assert gradient_RV.shape == (0, 150)
    assert all(field is None or len(field) == 0 for field in fields.values())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rows_beyond_two_to_the_31_elements_are_found(beta):
    V, stride, R = 70, 2**30, 3
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of GPU memory")
    # 8 GiB of addresses; on a CPU only the pages that are written become memory.
    memory = torch.empty((R - 1) * stride + 2 * V, device=DEVICE)
    student_RV, teacher_RV = (memory.as_strided((R, V), (stride, 1), offset) for offset in (0, V))
    near_RV, teacher_near_RV = pair(V, R=R)
    student_RV.copy_(near_RV)
    teacher_RV.copy_(teacher_near_RV)
    objective = Objective(beta=beta)
    options = {"kind": objective.kind, "is_tempered": False, "is_capped": False}
    ones_R = torch.ones(R, device=DEVICE)
    result = triton.compare_rows(student_RV, teacher_RV, None, ones_R, None, objective.numbers(None), **options)
    fields, gradient_RV = compare(near_RV, teacher_near_RV, objective, value_weight_R=torch.ones(R), chunk=triton.CHUNK)
    assert torch.equal(result.values_N.cpu(), fields["values_N"])
    assert torch.equal(student_RV.cpu(), gradient_RV)


def test_a_slope_beyond_the_range_of_float16_is_cut():
    student_RV, teacher_RV = pair(64)
    student_RV[:, :2] += 60
    teacher_RV[:, 0] += 70
    weights = {"value_weight_R": torch.full((R,), 4096.0)}
    _, whole_RV = compare(student_RV, teacher_RV, Objective(beta=1.0), **weights)
    fields, half_RV = compare(student_RV, teacher_RV, Objective(beta=1.0), **weights, half=torch.float16)
    assert fields["is_finite_N"].all()
    limit = torch.finfo(torch.float16).max
    assert whole_RV.abs().max() > limit
    assert torch.equal(half_RV, whole_RV.clamp(-limit, limit).half())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program at a time")
def test_gradients_in_half_precision_of_many_rows_are_those_of_float32_rounded_and_repeat():
    R, V = 1000, 151_665
    student_RV, teacher_RV = (torch.randn(R, V, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(2))
    weights = {"value_weight_R": torch.ones(R)}
    _, whole_RV = compare(student_RV, teacher_RV, Objective(beta=0.5), **weights, chunk=triton.CHUNK)
    for _ in range(5):
        _, half_RV = compare(
            student_RV, teacher_RV, Objective(beta=0.5), **weights, half=torch.bfloat16, chunk=triton.CHUNK
        )
        assert torch.equal(half_RV, whole_RV.bfloat16())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("beta", "V"), [(0.0, 150), (0.5, 150), (1.0, 64), (0.5, 1)])
def test_a_gradient_in_half_precision_is_the_float32_one_rounded(half, beta, V):
    student_RV, teacher_RV = pair(V)
    weights = {
        "labels_R": torch.tensor([0, V - 1, 0, V // 2, -100]),
        "value_weight_R": torch.linspace(-1, 2, R),
        "label_weight_R": torch.linspace(2, -1, R),
    }
    objective = Objective(beta=beta)
    expected, whole_RV = compare(student_RV, teacher_RV, objective, **weights)
    fields, half_RV = compare(student_RV, teacher_RV, objective, **weights, half=half)
    assert half_RV.dtype == half
    if DEVICE == "cpu" and half == torch.bfloat16:  # the interpreter cuts bits off
        torch.testing.assert_close(half_RV.float(), whole_RV, rtol=2**-7, atol=0)
    else:
        assert torch.equal(half_RV, whole_RV.to(half))
    assert torch.equal(fields["values_N"], expected["values_N"])


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("trained", [{"hidden_NH", "weight_VH", "bias_V"}, {"hidden_NH"}])
def test_hidden_states_in_padded_rows_of_halves_give_the_gradient_of_plain_torch(beta, trained, monkeypatch):
    N, V, H = 9, 37, 8
    generator = torch.Generator().manual_seed(0)

    def signal(*, is_trained):
        tensors = {"hidden_NH": (N, H), "weight_VH": (V + 3, H), "bias_V": (V + 3,)}
        for name, shape in tensors.items():
            tensors[name] = torch.randn(shape, generator=generator).to(DEVICE)
            tensors[name].requires_grad_(is_trained and name in trained)
        return HiddenSignal(tensors["hidden_NH"], Head(tensors["weight_VH"], tensors["bias_V"], scale=0.7)).sliced(V)

    student, teacher = signal(is_trained=True), signal(is_trained=False)
    leaves = [
        tensor for tensor in (student.hidden_NH, student.head.weight_VH, student.head.bias_V) if tensor.requires_grad
    ]
    monkeypatch.setattr(
        linear, "plan_for", lambda *options: replace(plan_for(*options), padding=16, scratch=48, multiple=4, tile=4)
    )
    stored = []
    add_gradient = linear.Projection.add_gradient
    monkeypatch.setattr(
        linear.Projection,
        "add_gradient",
        lambda self, slope_RV, *rest: (
            stored.append((slope_RV.dtype, slope_RV.stride())),
            add_gradient(self, slope_RV, *rest),
        ),
    )
    gradients = {}
    for engine, product_dtype in (("triton", torch.bfloat16), ("eager", None)):
        monkeypatch.setattr(rows, "_engine", engine)
        values_N = token_divergence(student, teacher, beta=beta, product_dtype=product_dtype).values_N
        gradients[engine] = torch.autograd.grad(values_N.sum(), leaves)
    assert stored[:3] == [(torch.bfloat16, (96, 1))] * 3  # two halves to a float32, in rows of 48
    assert stored[3:] == [(torch.float32, (48, 1))] * 3
    for actual, expected in zip(gradients["triton"], gradients["eager"], strict=True):
        assert_close_in_norm(actual, expected.double(), tolerance=1e-2)


@jit
def _mixture_kernel(gap_ptr, q_ptr, p_ptr, share_p, share_q, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    log_q_over_m, log_p_over_m = triton._log_over_mixture(tl.load(gap_ptr + ids), share_p, share_q)
    tl.store(q_ptr + ids, log_q_over_m)
    tl.store(p_ptr + ids, log_p_over_m)


@jit
def _rough_exp2(x):
    return tl.exp2(x) * (1 + 2.0**-22)


@jit
def _rough_log2(x):
    return tl.log2(x) * (1 + 2.0**-22) + 2.0**-22


@pytest.mark.parametrize("share", [2**-20, 2**-10, 0.125, 0.5, 0.875, 1 - 2**-10])
@pytest.mark.parametrize("is_rough", [False, True])
def test_logarithms_over_the_mixture_are_right_to_a_millionth_even_with_a_processors_approximations(
    share, is_rough, monkeypatch
):
    if is_rough and DEVICE == "cuda":
        pytest.skip("a GPU has its own approximations")
    if is_rough:  # by the largest errors that the PTX ISA states for ex2.approx and lg2.approx
        monkeypatch.setattr(triton, "_exp2", _rough_exp2)
        monkeypatch.setattr(triton, "_log2", _rough_log2)
    gap = torch.cat([torch.linspace(-20, 20, 3500), torch.logspace(-8, 0, 298), torch.logspace(-8, 0, 298).neg()])
    gap = functional.pad(gap, (0, 4096 - len(gap))).to(DEVICE)
    actual_q, actual_p = torch.empty_like(gap), torch.empty_like(gap)
    with torch.cuda.device_of(gap):
        _mixture_kernel[(1,)](gap, actual_q, actual_p, share, 1 - share, SIZE=4096, **triton.LAUNCH)
    exact = gap.double()
    expected_q = -torch.log1p(share * torch.expm1(-exact))
    for actual, expected in ((actual_q, expected_q), (actual_p, expected_q - exact)):
        assert ((actual.double() - expected).abs() <= 1e-6 * exact.abs().clamp_min(1)).all()
    # It is as small as the other share, and counts as much.
    actual, expected = (actual_q, expected_q) if share <= 0.5 else (actual_p, expected_q - exact)
    assert ((actual.double() - expected).abs() <= 2e-6 * expected.abs() + 1e-12).all()


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
    teacher_RV[1, 3], teacher_RV[2], student_RV[3, 1], teacher_RV[4, 5] = math.nan, -math.inf, math.inf, 1e30
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


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min, -1e4, -150.0])
@pytest.mark.parametrize("V", [37, 150])
def test_a_token_that_one_side_forbids_and_the_other_hardly_allows_counts_as_in_plain_torch(beta, masked, V):
    """Its gap is infinite, and its probability underflows: it comes before, among and after the tokens that count."""
    nearly_RV, forbidding_RV = pair(V)
    for columns in (slice(0, 9), slice(20, 24), slice(V - 3, V)):
        nearly_RV[:, columns], forbidding_RV[:, columns] = masked, -math.inf
    student_RV, teacher_RV = (nearly_RV, forbidding_RV) if beta == 1 else (forbidding_RV, nearly_RV)
    objective, weights = Objective(beta=beta), {"value_weight_R": torch.linspace(-1, 2, R)}
    fields, gradient_RV = compare(student_RV, teacher_RV, objective, **weights)
    expected = LogitsComparison(objective)(student_RV, (teacher_RV,), **weights)
    assert expected.is_finite_N.all()
    torch.testing.assert_close(fields["values_N"], expected.values_N, rtol=1e-5, atol=2e-6)
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


@pytest.mark.parametrize("options", [(1e-6, 1.0), (0.2, 0.7), (0.7, 1e-6)])
def test_small_options_of_alpha_beta_leave_value_and_gradient_right_in_proportion(options):
    student_RV, _ = pair(150)
    teacher_RV = student_RV + 0.1 * torch.randn(R, 150, generator=torch.Generator().manual_seed(1))
    options = dict(zip(("alpha", "beta"), options, strict=True))
    objective = checked_objective("alpha_beta", options)
    fields, gradient_RV = compare(student_RV, teacher_RV, objective, value_weight_R=torch.ones(R))
    student_RV.requires_grad_()
    expected_R = reference_divergence(student_RV, teacher_RV, divergence="alpha_beta", **options)
    (expected_RV,) = torch.autograd.grad(expected_R.sum(), student_RV)
    torch.testing.assert_close(fields["values_N"].double(), expected_R, rtol=1e-3, atol=0)
    assert_close_in_norm(gradient_RV, expected_RV.double(), tolerance=2e-5)


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

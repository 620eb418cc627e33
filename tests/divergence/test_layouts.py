"""Tensors that are not contiguous, against the float64 oracle: each path, on each engine that runs here.

test_triton.py runs this file in Triton's interpreter too, which adds Triton to the engines.
Shapes: N tokens, V vocabulary, H, G hidden widths, K top tokens of a teacher.
"""

import os

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import reference_divergence, reference_jsd, reference_topk_jsd, rows, token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal, TopKSignal

N, V, H, G, K = 6, 37, 5, 7, 4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
ENGINES = ["eager", "triton"] if HAS_TRITON else ["eager"]

OBJECTIVES = [
    {"beta": 0.0},
    {"beta": 0.3},
    {"beta": 1.0},
    {"beta": 0.3, "temperature": 2.0, "scale": "continuous"},
    *({"divergence": name} for name in DIVERGENCES if name != "jsd"),
]

NAMES = ["-".join(map(str, options.values())) for options in OBJECTIVES]


def transposed(tensor):
    """Column-major: neighbours in a row lie far apart."""
    return tensor.t().contiguous().t() if tensor.ndim == 2 else strided(tensor)


def strided(tensor):
    """Every other element of a larger tensor, whose remaining ones would spoil whatever they enter."""
    wider = tensor.new_full((*tensor.shape, 2), -7 if tensor.dtype == torch.long else float("nan"))
    wider[..., 0] = tensor
    return wider[..., 0]


def padded(tensor):
    """The first columns of a wider tensor, whose remaining ones would spoil whatever they enter."""
    wider = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), -7 if tensor.dtype == torch.long else 1e9)
    wider[..., : tensor.shape[-1]] = tensor
    return wider[..., : tensor.shape[-1]]


def repeated(tensor):
    """The first row or element in place of all, with a stride of zero."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = [strided, padded, repeated]
"""The layouts beside `transposed`, which all divergences are tried in."""

CASES = [
    *(
        pytest.param(options, transposed, id=f"{name}-transposed")
        for options, name in zip(OBJECTIVES, NAMES, strict=True)
    ),
    *(pytest.param(OBJECTIVES[3], layout, id=f"{NAMES[3]}-{layout.__name__}") for layout in LAYOUTS),
]


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request, monkeypatch):
    """Run the comparison by this engine, if it has the divergence."""
    if request.param == "triton":
        from gkd_trainer.divergence.triton import KINDS

        options = getattr(request.node, "callspec", request).params.get("options", {})
        if options.get("divergence", "jsd") not in KINDS:
            pytest.skip("this divergence has no kernel")
    monkeypatch.setattr(rows, "_engine", request.param)
    return request.param


def randn(*shape, seed, std=1.0):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def leaf(tensor):
    return tensor.detach().requires_grad_()


def labels(layout):
    return layout(torch.tensor([3, V - 1, -100, 0, 17, V // 2]).to(DEVICE))


def label_weight(layout):
    return layout(torch.linspace(0.1, 0.8, N).to(DEVICE))


def oracle_logits(signal):
    if isinstance(signal, LogitsSignal):
        return signal.logits_NV.double()
    head = signal.head.cut()
    bias_V = None if head.bias_V is None else head.bias_V.double()
    logits_NV = functional.linear(signal.hidden_NH.double(), head.weight_VH.double(), bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * (logits_NV / head.softcap).tanh()


def oracle(student, teacher, *, divergence="jsd", tail="bucket", **options):
    student_logits_NV = oracle_logits(student)
    if isinstance(teacher, TopKSignal):
        # It indexes on the CPU.
        of_teacher = teacher.ids_NK.cpu(), teacher.log_p_NK.cpu()
        return reference_topk_jsd(student_logits_NV.cpu(), *of_teacher, tail=tail, **options).to(DEVICE)
    if divergence != "jsd":
        return reference_divergence(student_logits_NV, oracle_logits(teacher), divergence=divergence, **options)
    return reference_jsd(student_logits_NV, oracle_logits(teacher), **options)


def assert_equal_to_the_oracle(student, teacher, leaves, *, labels_N, label_weight_N, upstream_N, **options):
    """Compare values, cross entropy, and the gradients of their mix, weighted by token."""
    result = token_divergence(student, teacher, labels_N=labels_N, label_weight_N=label_weight_N, **options)
    expected_N = oracle(student, teacher, **{name: value for name, value in options.items() if name != "token_block"})
    cross_entropy_N = functional.cross_entropy(oracle_logits(student), labels_N, reduction="none")
    torch.testing.assert_close(result.values_N.double(), expected_N, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(result.cross_entropy_N.double(), cross_entropy_N, rtol=1e-5, atol=2e-6)
    expected_loss_N = (1 - label_weight_N) * expected_N + label_weight_N * cross_entropy_N
    torch.testing.assert_close(result.loss_N.double(), expected_loss_N, rtol=2e-5, atol=2e-6)
    for of, upstream in (("loss", upstream_N), ("loss", None), ("value and cross entropy", upstream_N)):
        if of == "loss":
            actual_N, wanted_N = result.loss_N, expected_loss_N
        else:
            actual_N, wanted_N = result.values_N - 2 * result.cross_entropy_N, expected_N - 2 * cross_entropy_N
        upstream = torch.ones((), device=DEVICE).expand(N) if upstream is None else upstream
        actual = torch.autograd.grad(actual_N, leaves, upstream, retain_graph=True)
        wanted = torch.autograd.grad(wanted_N, leaves, upstream.double(), retain_graph=True)
        for gradient, expected in zip(actual, wanted, strict=True):
            assert gradient.shape == expected.shape
            error = (gradient.double() - expected.double()).norm() / expected.double().norm()
            assert error <= 2e-5, f"{of}: relative error {error:.1e}"


def weights(layout):
    return {
        "labels_N": labels(layout),
        "label_weight_N": label_weight(layout),
        "upstream_N": layout(torch.linspace(-1, 2.5, N).to(DEVICE)),
    }


@pytest.mark.parametrize(("options", "layout"), CASES)
def test_logits_equal_the_oracle(options, layout):
    student_NV = randn(N, V, seed=0, std=2)
    teacher = LogitsSignal(layout(student_NV + randn(N, V, seed=1)))
    student_NV = leaf(layout(student_NV))
    assert_equal_to_the_oracle(LogitsSignal(student_NV), teacher, [student_NV], **weights(layout), **options)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("layout", [transposed, strided])
def test_the_two_sides_may_be_laid_out_differently(side, layout):
    student_NV, teacher_NV = randn(N, V, seed=0, std=2), randn(N, V, seed=1, std=2)
    student_NV = leaf(layout(student_NV) if side == "student" else student_NV)
    teacher_NV = layout(teacher_NV) if side == "teacher" else teacher_NV
    assert_equal_to_the_oracle(
        LogitsSignal(student_NV),
        LogitsSignal(teacher_NV),
        [student_NV],
        **weights(torch.clone),
        beta=0.3,
    )


@pytest.mark.parametrize("engine", ["compiled"], indirect=True)
def test_transposed_logits_equal_the_oracle_compiled_too():
    student_NV = leaf(transposed(randn(N, V, seed=0, std=2)))
    teacher = LogitsSignal(transposed(randn(N, V, seed=1, std=2)))
    assert_equal_to_the_oracle(LogitsSignal(student_NV), teacher, [student_NV], **weights(transposed), beta=0.3)


def hidden_signals(layout):
    """Return both sides, a head's rows of padding cut off, and the student's tensors."""
    padding = 3
    hidden_NH, weight_VH, bias_V = (
        leaf(layout(tensor))
        for tensor in (randn(N, H, seed=0), randn(V + padding, H, seed=1), randn(V + padding, seed=2, std=0.5))
    )
    teacher_head = Head(layout(randn(V + padding, G, seed=4)), layout(randn(V + padding, seed=5)))
    teacher = HiddenSignal(layout(randn(N, G, seed=3)), teacher_head)
    student = HiddenSignal(hidden_NH, Head(weight_VH, bias_V, 0.7, 4.0))
    return student.sliced(V), teacher.sliced(V), [hidden_NH, weight_VH, bias_V]


@pytest.mark.parametrize("layout", [transposed, *LAYOUTS])
def test_a_layout_is_made_on_the_device_since_a_copy_to_it_may_be_contiguous(layout, monkeypatch):
    def strides(device):
        monkeypatch.setitem(globals(), "DEVICE", device)
        _, teacher, leaves = hidden_signals(layout)
        tensors = [*leaves, teacher.hidden_NH, teacher.head.weight_VH, teacher.head.bias_V, *weights(layout).values()]
        assert all(tensor.device.type == device for tensor in tensors)
        return [tensor.stride() for tensor in tensors]

    assert strides("meta") == strides("cpu")


@pytest.mark.parametrize(("options", "layout"), CASES)
def test_hidden_states_and_heads_equal_the_oracle(options, layout):
    # Of heads of equal rows there is no gradient to compare.
    student, teacher, leaves = hidden_signals(torch.clone if layout is repeated else layout)
    if layout is repeated:
        leaves[0] = leaf(repeated(student.hidden_NH))
        student = HiddenSignal(leaves[0], student.head)
    assert_equal_to_the_oracle(student, teacher, leaves, **weights(layout), **options, token_block=4)


@pytest.mark.parametrize(
    ("beta", "tail", "layout"),
    [
        *((beta, tail, transposed) for beta in (0.0, 0.3, 1.0) for tail in ("bucket", "renormalize")),
        *((0.3, "renormalize", layout) for layout in LAYOUTS),
    ],
)
@pytest.mark.parametrize("has_hidden_states", [False, True])
def test_top_tokens_equal_the_oracle(beta, tail, layout, has_hidden_states):
    top_NK = randn(N, V, seed=1, std=2).log_softmax(dim=1).topk(K, dim=1)
    teacher = TopKSignal(layout(top_NK.indices), layout(top_NK.values), V)
    if has_hidden_states:
        student, _, leaves = hidden_signals(torch.clone if layout is repeated else layout)
    else:
        leaves = [leaf(layout(randn(N, V, seed=0, std=2)))]
        student = LogitsSignal(*leaves)
    assert_equal_to_the_oracle(student, teacher, leaves, **weights(layout), beta=beta, tail=tail, token_block=4)


@pytest.mark.parametrize("options", OBJECTIVES, ids=NAMES)
@pytest.mark.parametrize("form", ["logits", "hidden states"])
def test_no_tokens_give_a_gradient_of_zero(options, form):
    student, teacher, leaves = hidden_signals(torch.clone)
    student, teacher = (HiddenSignal(side.hidden_NH[:0], side.head) for side in (student, teacher))
    if form == "logits":
        leaves = [leaf(oracle_logits(student).float())]
        student, teacher = LogitsSignal(*leaves), LogitsSignal(oracle_logits(teacher).float())
    empty_N = torch.zeros(0, device=DEVICE)
    result = token_divergence(student, teacher, labels_N=empty_N.long(), label_weight_N=empty_N, **options)
    assert len(result.values_N) == len(result.agrees_N) == 0
    for gradient, of in zip(torch.autograd.grad(result.loss_N.sum(), leaves), leaves, strict=True):
        assert gradient.shape == of.shape
        assert (gradient == 0).all()


def gradients_beside(broken, value, keep=None, **options):
    """The result and the student's gradients of all rows, one of them broken on one side; or of the rows kept."""
    student, teacher, leaves = hidden_signals(torch.clone)
    sides = {"student": student.hidden_NH, "teacher": teacher.hidden_NH}
    if keep is None:
        sides = {side: hidden_NH.detach().clone() for side, hidden_NH in sides.items()}
        sides[broken][2] = value  # makes NaN of NaN and, by inf - inf, of infinity
        sides[broken][2, 0] = -value
        leaves[0] = leaf(sides["student"])
        sides["student"] = leaves[0]
        keep = range(N)
    student, teacher = (
        HiddenSignal(sides[side][list(keep)], signal.head)
        for side, signal in (("student", student), ("teacher", teacher))
    )
    if "label" in options:
        options["labels_N"] = torch.full((len(keep),), options.pop("label"), device=DEVICE)
    result = token_divergence(student, teacher, **options)
    total = result.values_N.sum() + (0 if result.cross_entropy_N is None else result.cross_entropy_N.sum())
    return result, torch.autograd.grad(total, leaves)


def assert_the_broken_row_adds_nothing(broken, value, **options):
    result, actual = gradients_beside(broken, value, **options)
    assert result.is_finite_N.tolist() == [row != 2 for row in range(N)]
    _, expected = gradients_beside(broken, value, [row for row in range(N) if row != 2], **options)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OBJECTIVES, ids=NAMES)
@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_gradient_under_a_softcap_either(options, broken, value):
    assert_the_broken_row_adds_nothing(broken, value, **options)


@pytest.mark.parametrize("engine", [*ENGINES, "compiled"], indirect=True)
def test_a_row_without_numbers_has_no_gradient_of_its_cross_entropy_either():
    assert_the_broken_row_adds_nothing("student", float("nan"), beta=0.3, label=0)

"""The path from hidden states: how often it projects, in how much memory, and with which implementation.

Shapes: N tokens, V vocabulary, H, G hidden widths, K top tokens of a teacher.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from gkd_trainer.divergence import reference_jsd, reference_topk_jsd, rows, token_divergence, topk
from gkd_trainer.divergence.projection import Projection
from gkd_trainer.signals import Head, HiddenSignal, TopKSignal
from tests.memory import NewStorages

N, V, H, G, K = 11, 67, 8, 13, 5

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def signal(*, N=N, V=V, width=H, seed=0, dtype=torch.float32, device="cpu", requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, width, generator=generator)
    weight_VH = torch.randn(V, width, generator=generator) * 2 / width**0.5
    hidden_NH, weight_VH = (leaf.to(device, dtype).requires_grad_(requires_grad) for leaf in (hidden_NH, weight_VH))
    return HiddenSignal(hidden_NH, Head(weight_VH))


def teacher(**options):
    return signal(**{"width": G, "seed": 1, "requires_grad": False, **options})


def top_of(other, K=K):
    top_NK = logits(other).log_softmax(dim=1).float().topk(K, dim=1)
    return TopKSignal(top_NK.indices, top_NK.values, other.vocab_size)


def top_teacher(K=K, **options):
    return top_of(teacher(**options), K)


def reference(student, other, *, beta, temperature=1.0):
    if isinstance(other, TopKSignal):
        return reference_topk_jsd(logits(student), other.ids_NK, other.log_p_NK, beta=beta)
    return reference_jsd(logits(student), logits(other), beta=beta, temperature=temperature)


# Teachers, with how many projections of N tokens a comparison with them takes.
TEACHERS = [pytest.param(teacher, 2, id="hidden"), pytest.param(top_teacher, 1, id="top-k")]


def leaves(signal):
    return [signal.hidden_NH, signal.head.weight_VH]


def logits(signal):
    return signal.hidden_NH.double() @ signal.head.weight_VH.double().T


def assert_close_in_norm(actual, expected, *, tolerance=5e-6):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.fixture
def projections(monkeypatch):
    """The number of rows in each projection, as they are made."""
    made = []
    project = Projection.logits
    monkeypatch.setattr(
        Projection,
        "logits",
        lambda self, hidden_BH, out_BV: (made.append(len(out_BV)), project(self, hidden_BH, out_BV)),
    )
    return made


@pytest.mark.parametrize(
    ("reduce", "times"),
    [
        (lambda values_N: values_N.sum() / 7, 1),
        (lambda values_N: values_N.mean(), 1),
        (lambda values_N: (values_N * torch.linspace(-1, 2, N)).sum(), 2),
    ],
)
@pytest.mark.parametrize(("make", "sides"), TEACHERS)
def test_an_upstream_that_is_the_same_for_all_tokens_projects_each_side_once(projections, reduce, times, make, sides):
    student, other = signal(), make()
    gradients = torch.autograd.grad(reduce(token_divergence(student, other, beta=0.5).values_N), leaves(student))
    assert sum(projections) == sides * N * times
    expected = torch.autograd.grad(reduce(reference(student, other, beta=0.5)), leaves(student))
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close_in_norm(actual, wanted)


@pytest.mark.parametrize(("make", "sides"), TEACHERS)
def test_without_a_graph_no_gradient_is_made(projections, monkeypatch, make, sides):
    monkeypatch.setattr(Projection, "add_gradient", None)
    monkeypatch.setattr(topk, "_write", None)
    with torch.no_grad():
        token_divergence(signal(), make(), beta=0.5)
    token_divergence(signal(requires_grad=False), make(), beta=0.5)
    assert sum(projections) == 2 * sides * N


@pytest.mark.parametrize("make", [teacher, top_teacher])
def test_a_second_backward_pass_gives_the_same_gradient(make):
    student = signal()
    loss = token_divergence(student, make(), beta=0.5).values_N.sum() / 3
    first = torch.autograd.grad(loss, leaves(student), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for again, gradient in zip(torch.autograd.grad(loss, leaves(student)), kept, strict=True):
        assert_close_in_norm(again, gradient)
    for gradient, before in zip(first, kept, strict=True):
        assert torch.equal(gradient, before)


@pytest.mark.parametrize(
    ("make", "sides", "temperature"), [(teacher, 2, 1.0), (teacher, 2, 2.0), (top_teacher, 1, 1.0)]
)
def test_a_mix_known_beforehand_is_one_pass_with_the_gradient_of_the_mix(projections, make, sides, temperature):
    student, other = signal(), make()
    labels_N, weight_N = torch.arange(N), torch.linspace(0, 1, N)
    labels_N[3] = -100
    result = token_divergence(
        student, other, beta=0.3, temperature=temperature, labels_N=labels_N, label_weight_N=weight_N
    )
    gradients = torch.autograd.grad(result.loss_N.sum() / 5, leaves(student), retain_graph=True)
    assert sum(projections) == sides * N
    values_N = reference(student, other, beta=0.3, temperature=temperature)
    cross_entropy_N = functional.cross_entropy(logits(student), labels_N, reduction="none")
    expected_N = (1 - weight_N) * values_N + weight_N * cross_entropy_N
    torch.testing.assert_close(result.loss_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(expected_N.sum() / 5, leaves(student), retain_graph=True)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close_in_norm(actual, wanted)
    # Together with upstreams of the parts, and not uniform.
    mixed_N = result.loss_N * weight_N - result.values_N + 2 * result.cross_entropy_N
    expected_N = expected_N * weight_N - values_N + 2 * cross_entropy_N
    expected = torch.autograd.grad(expected_N.sum(), leaves(student))
    for actual, wanted in zip(torch.autograd.grad(mixed_N.sum(), leaves(student)), expected, strict=True):
        assert_close_in_norm(actual, wanted)


@pytest.mark.parametrize(("make", "sides"), TEACHERS)
def test_cross_entropies_that_are_only_read_cost_no_further_pass(projections, make, sides):
    student, other, labels_N = signal(), make(), torch.arange(N)
    result = token_divergence(student, other, beta=0.5, labels_N=labels_N)
    gradients = torch.autograd.grad(result.values_N.sum() / 7, leaves(student))
    assert sum(projections) == sides * N
    cross_entropy_N = functional.cross_entropy(logits(student), labels_N, reduction="none")
    torch.testing.assert_close(result.cross_entropy_N.double(), cross_entropy_N, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(reference(student, other, beta=0.5).sum() / 7, leaves(student))
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close_in_norm(actual, wanted)


@pytest.mark.parametrize("make", [teacher, top_teacher])
def test_a_term_with_weight_zero_in_the_mix_may_be_infinite(make):
    student = signal()
    labels_N, weight_N = torch.full((N,), V), torch.zeros(N)
    result = token_divergence(student, make(), beta=0.5, labels_N=labels_N, label_weight_N=weight_N)
    assert torch.equal(result.loss_N, result.values_N)
    values_N = token_divergence(student, make(), beta=0.5).values_N
    expected = torch.autograd.grad(values_N.sum(), leaves(student))
    for actual, wanted in zip(torch.autograd.grad(result.loss_N.sum(), leaves(student)), expected, strict=True):
        assert_close_in_norm(actual, wanted)


def test_a_head_that_is_tied_to_the_embeddings_adds_its_gradient_to_theirs():
    weight_VH = signal().head.weight_VH
    ids_N = torch.arange(N)

    def gradient(divergence):
        hidden_NH = functional.embedding(ids_N, weight_VH).tanh()
        return torch.autograd.grad(divergence(HiddenSignal(hidden_NH, Head(weight_VH))).sum(), weight_VH)[0]

    other = teacher()
    assert_close_in_norm(
        gradient(lambda student: token_divergence(student, other, beta=0.5).values_N),
        gradient(lambda student: reference_jsd(logits(student), logits(other), beta=0.5)),
    )


def test_a_padded_vocabulary_is_cut_without_a_copy(monkeypatch):
    student, other = signal(), teacher(V=V + 5)
    seen = []
    project = Projection.logits
    monkeypatch.setattr(
        Projection,
        "logits",
        lambda self, hidden_BH, out_BV: (seen.append(self.head.weight_VH.data_ptr()), project(self, hidden_BH, out_BV)),
    )
    values_N = token_divergence(student.sliced(60), other.sliced(60), beta=0.5).values_N
    assert seen == [student.head.weight_VH.data_ptr(), other.head.weight_VH.data_ptr()]
    gradient_VH = torch.autograd.grad(values_N.sum(), student.head.weight_VH)[0]
    assert (gradient_VH[60:] == 0).all()
    assert (gradient_VH[:60] != 0).any(dim=1).all()


@pytest.mark.parametrize("make", [teacher, top_teacher])
def test_a_padded_vocabulary_has_one_gradient_of_the_full_weight_and_bias(make):
    whole, other = signal(V=4096, width=64), make(V=4000)
    bias_V = torch.linspace(-1, 1, 4096).requires_grad_()
    student = replace(whole, head=replace(whole.head, bias_V=bias_V)).sliced(4000)
    wanted = (*leaves(whole), bias_V)
    with NewStorages() as memory:
        values_N = token_divergence(student, other, beta=0.5, token_block=1).values_N
        gradients = torch.autograd.grad(values_N.sum(), wanted)
    assert memory.peak < 1.5 * 4 * whole.head.weight_VH.numel()
    cut_NV = logits(whole)[:, :4000] + bias_V.double()[:4000]
    teacher_NV = logits(teacher(V=4000))
    expected_N = reference_jsd(cut_NV, teacher_NV, beta=0.5)
    if isinstance(other, TopKSignal):
        expected_N = reference_topk_jsd(cut_NV, other.ids_NK, other.log_p_NK, beta=0.5)
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_N.sum(), wanted), strict=True):
        assert gradient.shape == expected.shape
        assert_close_in_norm(gradient, expected)


def test_a_sharded_head_is_gathered_and_its_gradient_finds_the_shards():
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student, other = signal(), teacher()
        sharded = distribute_tensor(student.head.weight_VH.detach(), init_device_mesh("cpu", (1,))).requires_grad_()
        token_divergence(HiddenSignal(student.hidden_NH, Head(sharded)), other, beta=0.5).values_N.sum().backward()
        token_divergence(student, other, beta=0.5).values_N.sum().backward()
        assert isinstance(sharded.grad, DTensor)
        torch.testing.assert_close(sharded.grad.full_tensor(), student.head.weight_VH.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("has_top_tokens", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_student_row_that_is_not_finite_does_not_reach_the_weights_gradient(has_top_tokens, softcap):
    student, other = signal(), teacher()
    student = replace(student, head=replace(student.head, softcap=softcap))

    def compare(student, other):
        return token_divergence(student, top_of(other) if has_top_tokens else other, beta=0.5)

    broken_NH = student.hidden_NH.detach().clone()
    broken_NH[4, 2] = float("nan")
    broken = HiddenSignal(broken_NH.requires_grad_(), student.head)
    result = compare(broken, other)
    assert result.is_finite_N.tolist() == [row != 4 for row in range(N)]
    hidden_NH, weight_VH = torch.autograd.grad(result.values_N.sum(), leaves(broken))
    assert (hidden_NH[4] == 0).all()
    others = [row for row in range(N) if row != 4]
    rest = HiddenSignal(student.hidden_NH[others], student.head)
    of_rest = compare(rest, HiddenSignal(other.hidden_NH[others], other.head))
    expected_NH, expected_VH = torch.autograd.grad(of_rest.values_N.sum(), leaves(student))
    assert_close_in_norm(weight_VH, expected_VH)
    assert_close_in_norm(hidden_NH, expected_NH)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_vocabulary_of_one_token_has_no_divergence(beta):
    student, other = signal(V=1), teacher(V=1)
    values_N = token_divergence(student, other, beta=beta).values_N
    assert (values_N == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(values_N.sum(), leaves(student)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mb", [1, 2])
@pytest.mark.parametrize("make", [teacher, top_teacher, partial(top_teacher, K=300)])
def test_memory_beyond_inputs_and_gradients_stays_in_the_budget_for_any_number_of_tokens(
    dtype, workspace_mb, make, monkeypatch
):
    monkeypatch.setattr(rows, "_CPU_TILE_ELEMENTS", 2**13)
    V = 2000
    for N in (64, 320):
        student, other = signal(N=N, V=V, dtype=dtype), make(N=N, V=V, dtype=dtype)
        with NewStorages() as memory:
            token_divergence(student, other, beta=0.5, workspace_mb=workspace_mb).values_N.sum().backward()
        gradients = 4 * sum(leaf.numel() for leaf in leaves(student))
        if dtype == torch.bfloat16:  # and what they are rounded to
            gradients += gradients // 2
        assert memory.peak - gradients <= 1.1 * workspace_mb * 2**20
        # Some of it is made use of, if there are as many tokens.
        assert N == 64 or memory.peak - gradients >= 0.6 * workspace_mb * 2**20


@pytest.mark.parametrize("workspace_mb", [1, 1.5, 100])
@pytest.mark.parametrize("make", [teacher, top_teacher])
def test_the_budget_does_not_change_the_result(workspace_mb, make):
    student, other = signal(N=300, V=1000), make(N=300, V=1000)
    expected_N = reference(student, other, beta=0.5)
    actual_N = token_divergence(student, other, beta=0.5, workspace_mb=workspace_mb).values_N
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(expected_N.sum(), leaves(student))
    for gradient, wanted in zip(torch.autograd.grad(actual_N.sum(), leaves(student)), expected, strict=True):
        assert_close_in_norm(gradient, wanted)

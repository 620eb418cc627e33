"""Several teachers, grouped or summed, against the float64 oracle and against one call per teacher.

Shapes: N tokens, V vocabulary, H the student's hidden width, K top tokens of a teacher.
"""

import pytest
import torch

from gkd_trainer.divergence import reference_jsd, reference_topk_jsd, token_divergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import GroupedSignal, Head, HiddenSignal, LogitsSignal, SummedSignal, TopKSignal

N, V, H, K = 13, 67, 8, 5
BETAS = (0.0, 0.3, 1.0)
ONE = {"hidden": ("hidden",) * 3, "top-k": ("top-k",) * 3}
MIXED = {
    "hidden and top-k": ("hidden", "top-k", "hidden"),
    "hidden and logits": ("hidden", "logits", "hidden"),
    "all": ("logits", "hidden", "top-k"),
}
KINDS = {**ONE, **MIXED}
SIZES = {"odd sizes": (6, 2, 5), "an empty group": (4, 0, 9), "all in one": (0, 13, 0), "no tokens": (0, 0, 0)}


def randn(*shape, seed, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_of(kind, *, count=N):
    """A student with gradients, and its leaves."""
    hidden_NH = randn(count, H, seed=0).float().requires_grad_()
    weight_VH = randn(V, H, seed=1, std=0.7).float().requires_grad_()
    bias_V = randn(V, seed=2, std=0.5).float().requires_grad_()
    signal = HiddenSignal(hidden_NH, Head(weight_VH, bias_V, 0.7, 5.0))
    if kind == "logits":
        return LogitsSignal(signal.head.logits(hidden_NH)), [hidden_NH, weight_VH, bias_V]
    return signal, [hidden_NH, weight_VH, bias_V]


def teacher_of(kind, count, seed):
    """One teacher's signal at `count` positions; each has a width of its own."""
    width = H + seed % 3
    signal = HiddenSignal(
        randn(count, width, seed=seed).float(), Head(randn(V, width, seed=seed + 50, std=0.7).float(), None, 1.3, 9.0)
    )
    if kind == "hidden":
        return signal
    logits_NV = signal.head.logits(signal.hidden_NH)
    if kind == "logits":
        return LogitsSignal(logits_NV)
    top = logits_NV.log_softmax(dim=1).topk(K, dim=1)
    return TopKSignal(top.indices, top.values, V)


def oracle(student, teacher, beta):
    """The divergence of each token in float64, from the student's logits."""
    if isinstance(teacher, TopKSignal):
        return reference_topk_jsd(student, teacher.ids_NK, teacher.log_p_NK, beta=beta)
    logits_NV = teacher.logits_NV if isinstance(teacher, LogitsSignal) else teacher.head.logits(teacher.hidden_NH)
    return reference_jsd(student, logits_NV, beta=beta)


def grouped(kinds, sizes):
    order_N = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(7))
    groups = [teacher_of(kind, size, seed) for seed, (kind, size) in enumerate(zip(kinds, sizes, strict=True), 10)]
    return GroupedSignal(order_N, tuple(groups))


def oracle_of_groups(logits_NV, teacher, beta):
    """One oracle call per group, each value at its position."""
    values_N, start = logits_NV.new_zeros(len(logits_NV)), 0
    for group in teacher.groups:
        size = len(next(value for value in vars(group).values() if isinstance(value, torch.Tensor)))
        at = teacher.order_N[start : start + size]
        values_N = values_N.index_add(0, at, oracle(logits_NV[at], group, beta))
        start += size
    return values_N


def float64_logits(leaves):
    hidden_NH, weight_VH, bias_V = (leaf.detach().double().requires_grad_() for leaf in leaves)
    head = Head(weight_VH, bias_V, 0.7, 5.0)
    return head.logits(hidden_NH), [hidden_NH, weight_VH, bias_V]


def assert_close(actual, expected, tolerance=2e-5):
    scale = expected.double().norm().clamp_min(1e-9)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected.double()).norm() / scale) <= tolerance


def compared(teacher, beta, student_kind="hidden", upstream=None, **options):
    """Values and all gradients of the student, then those of the oracle in float64."""
    count = len(teacher.order_N) if isinstance(teacher, GroupedSignal) else N
    student, leaves = student_of(student_kind, count=count)
    values_N = token_divergence(student, teacher, beta=beta, **options).values_N
    upstream_N = torch.ones(()).expand(count) if upstream is None else upstream
    return values_N, torch.autograd.grad(values_N, leaves, upstream_N.to(values_N.dtype)), leaves


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_uniform", [True, False])
def test_groups_equal_one_oracle_call_per_group_in_value_and_all_gradients(kinds, sizes, beta, is_uniform):
    teacher = grouped(kinds, sizes)
    count = sum(sizes)
    upstream_N = None if is_uniform else torch.linspace(-1.0, 2.5, count)
    values_N, gradients, leaves = compared(teacher, beta, upstream=upstream_N, token_block=3)
    logits_NV, exact = float64_logits(leaves)
    expected_N = oracle_of_groups(logits_NV, teacher, beta)
    assert_close(values_N, expected_N)
    upstream_N = torch.ones(count) if upstream_N is None else upstream_N
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_N, exact, upstream_N.double()), strict=True):
        assert_close(gradient, reference)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("student_kind", ["hidden", "logits"])
@pytest.mark.parametrize("beta", BETAS)
def test_a_sum_equals_the_weighted_oracle_calls_in_value_and_all_gradients(kinds, student_kind, beta):
    weights = (0.2, 1.7, 3.0)
    teacher = SummedSignal(tuple(teacher_of(kind, N, seed) for seed, kind in enumerate(kinds, 10)), weights)
    upstream_N = torch.linspace(-1.0, 2.5, N)
    values_N, gradients, leaves = compared(teacher, beta, student_kind, upstream_N, token_block=4)
    logits_NV, exact = float64_logits(leaves)
    expected_N = sum(w * oracle(logits_NV, term, beta) for w, term in zip(weights, teacher.terms, strict=True))
    assert_close(values_N, expected_N)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_N, exact, upstream_N.double()), strict=True):
        assert_close(gradient, reference)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sum_of_any_number_of_terms_has_the_gradient_of_its_parts(count):
    terms = tuple(teacher_of("hidden", N, seed) for seed in range(10, 10 + count))
    weights = tuple(0.5 + index for index in range(count))
    values_N, gradients, leaves = compared(SummedSignal(terms, weights), 0.5, token_block=5)
    logits_NV, exact = float64_logits(leaves)
    expected_N = sum(w * oracle(logits_NV, term, 0.5) for w, term in zip(weights, terms, strict=True))
    assert_close(values_N, expected_N)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_N.sum(), exact), strict=True):
        assert_close(gradient, reference)


@pytest.mark.parametrize("kinds", [KINDS["hidden"], KINDS["all"]], ids=["tiled", "separate"])
@pytest.mark.parametrize("shape", ["grouped", "summed"])
def test_the_cross_entropy_is_mixed_in_once_per_token(kinds, shape):
    if shape == "grouped":
        teacher = grouped(kinds, (6, 2, 5))
    else:
        teacher = SummedSignal(tuple(teacher_of(kind, N, seed) for seed, kind in enumerate(kinds, 10)), (0.5, 0.2, 0.3))
    labels_N, weight_N = torch.arange(N), torch.linspace(0.0, 1.0, N)
    student, leaves = student_of("hidden")
    result = token_divergence(student, teacher, beta=0.3, labels_N=labels_N, label_weight_N=weight_N)
    logits_NV, exact = float64_logits(leaves)
    if shape == "grouped":
        values_N = oracle_of_groups(logits_NV, teacher, 0.3)
    else:
        terms = zip(teacher.weights, teacher.terms, strict=True)
        values_N = sum(weight * oracle(logits_NV, term, 0.3) for weight, term in terms)
    cross_entropy_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    expected_N = (1 - weight_N) * values_N + weight_N * cross_entropy_N
    assert_close(result.cross_entropy_N, cross_entropy_N)
    assert_close(result.loss_N, expected_N)
    gradients = torch.autograd.grad(result.loss_N.sum(), leaves)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_N.sum(), exact), strict=True):
        assert_close(gradient, reference)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_every_statistic_of_groups_is_that_of_the_position_s_own_teacher(kinds):
    teacher = grouped(kinds, (6, 2, 5))
    student, _ = student_of("hidden")
    actual = token_divergence(student, teacher, beta=0.5)
    start = 0
    for kind, group, size in zip(kinds, teacher.groups, (6, 2, 5), strict=True):
        at = teacher.order_N[start : start + size]
        alone = HiddenSignal(student.hidden_NH[at], student.head)
        expected = token_divergence(alone, group, beta=0.5)
        for name in ("student_entropy_N", "teacher_entropy_N", "agrees_N", "acceptance_N", "is_finite_N"):
            torch.testing.assert_close(getattr(actual, name)[at], getattr(expected, name), msg=name)
        if kind == "top-k":
            torch.testing.assert_close(actual.teacher_mass_N[at], expected.teacher_mass_N)
        elif "top-k" in kinds:
            assert actual.teacher_mass_N[at].isnan().all()
        else:
            assert actual.teacher_mass_N is None
        start += size


@pytest.mark.parametrize("kinds", [KINDS["hidden"], KINDS["all"]], ids=["tiled", "separate"])
def test_a_sum_gives_each_term_s_divergence_and_weighted_means_of_the_statistics(kinds):
    terms = tuple(teacher_of(kind, N, seed) for seed, kind in enumerate(kinds, 10))
    student, _ = student_of("hidden")
    actual = token_divergence(student, SummedSignal(terms, (3.0, 1.0, 4.0)), beta=0.5)
    alone = [token_divergence(student, term, beta=0.5) for term in terms]
    torch.testing.assert_close(actual.terms_NT, torch.stack([each.values_N for each in alone], dim=1).detach())
    for name in ("student_entropy_N", "teacher_entropy_N", "agrees_N", "acceptance_N"):
        expected_N = sum(weight * getattr(each, name) for weight, each in zip((3, 1, 4), alone, strict=True)) / 8
        torch.testing.assert_close(getattr(actual, name), expected_N, msg=name)


def test_a_group_may_itself_be_a_sum():
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(7))
    summed = SummedSignal((teacher_of("hidden", 9, 10), teacher_of("top-k", 9, 11)), (0.25, 0.75))
    alone = teacher_of("hidden", 4, 12)
    values_N, gradients, leaves = compared(GroupedSignal(order_N, (summed, alone)), 0.5)
    logits_NV, exact = float64_logits(leaves)
    first, last = logits_NV[order_N[:9]], logits_NV[order_N[9:]]
    of_sum = sum(w * oracle(first, term, 0.5) for w, term in zip(summed.weights, summed.terms, strict=True))
    expected_N = torch.zeros(N, dtype=torch.float64).index_add(
        0, order_N, torch.cat([of_sum, oracle(last, alone, 0.5)])
    )
    assert_close(values_N, expected_N)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected_N.sum(), exact), strict=True):
        assert_close(gradient, reference)


@pytest.mark.parametrize("shape", ["grouped", "summed"])
def test_gradcheck_in_float64(shape):
    leaves = [randn(*shape_of, seed=seed).requires_grad_() for seed, shape_of in enumerate([(4, 2), (5, 2), (5,)])]
    sizes = (3, 1) if shape == "grouped" else (4, 4)
    teachers = tuple(
        HiddenSignal(randn(size, 3, seed=size), Head(randn(5, 3, seed=seed))) for seed, size in enumerate(sizes, 10)
    )
    order_N = torch.tensor([2, 0, 3, 1])
    teacher = GroupedSignal(order_N, teachers) if shape == "grouped" else SummedSignal(teachers, (0.5, 2.0))

    def divergence(hidden_NH, weight_VH, bias_V):
        student = HiddenSignal(hidden_NH, Head(weight_VH, bias_V, 0.7, 5.0))
        return token_divergence(student, teacher, beta=0.3, token_block=2).values_N

    assert torch.autograd.gradcheck(divergence, leaves)


def test_a_summed_loss_of_groups_uses_the_gradient_of_the_forward_pass(monkeypatch):
    from gkd_trainer.divergence.projection import Projection

    calls = []
    logits = Projection.logits
    monkeypatch.setattr(Projection, "logits", lambda self, *args: (calls.append(1), logits(self, *args))[1])
    student, leaves = student_of("hidden")
    loss = token_divergence(student, grouped(("hidden",) * 3, (6, 2, 5)), beta=0.5).values_N.sum()
    assert len(calls) == 6  # each group's tile once per side
    torch.autograd.grad(loss, leaves)
    assert len(calls) == 6


def test_a_sum_projects_the_student_once_per_tile(monkeypatch):
    from gkd_trainer.divergence.projection import Projection

    calls = []
    logits = Projection.logits
    monkeypatch.setattr(Projection, "logits", lambda self, *args: (calls.append(1), logits(self, *args))[1])
    student, _ = student_of("hidden")
    terms = tuple(teacher_of("hidden", N, seed) for seed in range(3))
    token_divergence(student, SummedSignal(terms, (1.0, 1.0, 1.0)), beta=0.5)
    assert len(calls) == 1 + 3


def test_groups_that_do_not_make_up_the_positions_are_refused():
    student, _ = student_of("hidden")
    groups = (teacher_of("hidden", 6, 10), teacher_of("hidden", 6, 11))
    for order_N in (torch.arange(N), torch.arange(12).int(), torch.arange(12)[None]):
        with pytest.raises(GKDConfigError, match=r"order_N, an int64 permutation of the N positions .* \[6, 6\]"):
            token_divergence(student, GroupedSignal(order_N, groups))
    with pytest.raises(GKDConfigError, match="scored at the same positions; got N = 13 for the student and N = 12"):
        token_divergence(student, GroupedSignal(torch.arange(12), groups))
    with pytest.raises(GKDConfigError, match="groups inside a group"):
        token_divergence(student, GroupedSignal(torch.arange(12), (GroupedSignal(torch.arange(12), groups),)))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("inf")), (1.0, float("nan")), (1.0,)])
def test_weights_that_are_not_positive_and_finite_are_refused(weights):
    student, _ = student_of("hidden")
    terms = (teacher_of("hidden", N, 10), teacher_of("hidden", N, 11))
    with pytest.raises(GKDConfigError, match="a positive and finite weight for each of 2"):
        token_divergence(student, SummedSignal(terms, weights))


def test_terms_at_other_positions_or_over_other_tokens_are_refused():
    student, _ = student_of("hidden")
    longer = teacher_of("hidden", N + 1, 11)
    with pytest.raises(GKDConfigError, match=r"at the same positions; got N = \[13, 14\]"):
        token_divergence(student, SummedSignal((teacher_of("hidden", N, 10), longer), (1.0, 1.0)))
    narrower = teacher_of("hidden", N, 11).sliced(V - 1)
    with pytest.raises(GKDConfigError, match="the same vocabulary; got 67 tokens for the student and 66"):
        token_divergence(student, SummedSignal((teacher_of("hidden", N, 10), narrower), (1.0, 1.0)))

"""Teachers with another vocabulary, in every mode and on both paths, against float64. Shapes as in maps.py."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import MODES, HiddenSignal, LogitsSignal, MappedSignal, VocabularyMap
from tests.divergence.maps import G, N, V, W, a_map, expected, hidden, logits, mapped

BETAS = (0.0, 0.1, 0.5, 1.0)


def weights(seed=5):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mode", MODES)
def test_logits_give_the_definitions_value_and_gradient(mode, beta, temperature):
    mapping = a_map(mode)
    student_NV, teacher_NW = logits(N, V, seed=1).requires_grad_(), logits(N, W, seed=2)
    result = token_divergence(LogitsSignal(student_NV), mapped(teacher_NW, mapping), beta=beta, temperature=temperature)
    [gradient] = torch.autograd.grad((result.values_N * weights()).sum(), student_NV)
    values_N = expected(student_NV, teacher_NW, mapping, beta=beta, temperature=temperature)
    [expected_gradient] = torch.autograd.grad((values_N * weights()).sum(), student_NV)
    torch.testing.assert_close(result.values_N, values_N, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13)
    if mode == "matched" and temperature == 1:
        assert 0 < result.is_grouped_N.sum() < N  # both kinds of position were tested


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("token_block", [None, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_give_the_same_in_blocks_of_any_size(mode, token_block, dtype):
    mapping = a_map(mode)
    student = hidden(mapping, "student", dtype=dtype, scale=0.5, softcap=4.0)
    teacher = hidden(mapping, "teacher", dtype=dtype, softcap=6.0)
    leaves = student.hidden_NH, student.head.weight_VH
    result = token_divergence(
        student, MappedSignal(teacher, mapping), beta=0.3, temperature=1.3, token_block=token_block
    )
    found = torch.autograd.grad(result.values_N.sum(), leaves)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    student_NV = replace(student.head, weight_VH=exact[1]).logits(exact[0])
    teacher_NW = teacher.head.logits(teacher.hidden_NH).detach()
    values_N = expected(student_NV, teacher_NW, mapping, beta=0.3, temperature=1.3)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(result.values_N.double(), values_N, **tolerance)
    for gradient, exact_gradient in zip(found, torch.autograd.grad(values_N.sum(), exact), strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, **tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_are_compared_without_all_logits_of_either_side(mode):
    mapping = a_map(mode, V=600, W=900, M=450)
    student, teacher = (
        hidden(mapping, "student", N=1000, dtype=torch.float32),
        hidden(mapping, "teacher", N=1000, dtype=torch.float32),
    )
    largest = LargestTensor()
    with largest:
        token_divergence(student, MappedSignal(teacher, mapping), workspace_mb=1).values_N.sum().backward()
    assert largest.elements < 1000 * 600 / 3


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("is_permuted", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_tokens_give_exactly_the_ordinary_divergence_whatever_their_ids(beta, is_permuted):
    new_ids_V = torch.randperm(V, generator=torch.Generator().manual_seed(3)) if is_permuted else torch.arange(V)
    group_V = torch.arange(V) % 4
    teacher_group_V = torch.empty_like(group_V).scatter_(0, new_ids_V, group_V)
    mapping = VocabularyMap(torch.arange(V), new_ids_V, group_V, teacher_group_V, 4, "matched", 0.9)
    student_NV, teacher_NV = logits(N, V, seed=1).requires_grad_(), logits(N, V, seed=2)
    theirs_NV = torch.empty_like(teacher_NV)
    theirs_NV[:, new_ids_V] = teacher_NV
    results = [
        token_divergence(LogitsSignal(student_NV), teacher, beta=beta, temperature=1.2)
        for teacher in (LogitsSignal(teacher_NV), mapped(theirs_NV, mapping))
    ]
    gradients = [torch.autograd.grad(result.values_N.sum(), student_NV)[0] for result in results]
    for name in ("values_N", "student_entropy_N", "teacher_entropy_N", "agrees_N", "is_finite_N"):
        torch.testing.assert_close(getattr(results[1], name), getattr(results[0], name), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert not results[1].is_grouped_N.any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_cross_entropy_is_that_of_all_the_students_tokens(mode, softcap):
    mapping = a_map(mode)
    student, teacher = hidden(mapping, "student", softcap=softcap), hidden(mapping, "teacher")
    labels_N = torch.tensor([3, 22, -100, 0, 7, 7, 1])
    weight_N = torch.tensor([1.0, 0.5, 0.5, 0.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    result = token_divergence(student, MappedSignal(teacher, mapping), labels_N=labels_N, label_weight_N=weight_N)
    logits_NV = student.head.logits(student.hidden_NH)
    cross_entropy_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    values_N = expected(logits_NV, teacher.head.logits(teacher.hidden_NH).detach(), mapping)
    loss_N = (1 - weight_N) * values_N + weight_N * cross_entropy_N
    torch.testing.assert_close(result.loss_N, loss_N, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), student.hidden_NH)[0] for each in (result.loss_N, loss_N)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_give_a_zero_that_is_connected_to_the_graph(mode):
    mapping = a_map(mode)
    student, teacher = hidden(mapping, "student", N=0), hidden(mapping, "teacher", N=0)
    for signals in (
        (student, MappedSignal(teacher, mapping)),
        (LogitsSignal(logits(0, V, seed=1).requires_grad_()), mapped(logits(0, W, seed=2), mapping)),
    ):
        total = token_divergence(*signals).values_N.sum()
        assert total == 0
        total.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_is_flagged_and_leaves_the_others_their_gradient(mode, value):
    mapping = a_map(mode)
    teacher_NW = logits(N, W, seed=2)
    whole_NV, broken_NV = logits(N, V, seed=1), logits(N, V, seed=1)
    broken_NV[2, 4] = value
    gradients = []
    for student_NV in (whole_NV.requires_grad_(), broken_NV.requires_grad_()):
        result = token_divergence(LogitsSignal(student_NV), mapped(teacher_NW, mapping))
        gradients += torch.autograd.grad(result.values_N.sum(), student_NV)
    assert result.is_finite_N.tolist() == [True, True, False, True, True, True, True]
    kept = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(gradients[1][kept], gradients[0][kept], rtol=0, atol=0)
    assert (gradients[1][2] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_that_is_not_finite_is_flagged(mode):
    teacher_NW = logits(N, W, seed=2)
    teacher_NW[1] = float("nan")
    result = token_divergence(LogitsSignal(logits(N, V, seed=1)), mapped(teacher_NW, a_map(mode)))
    assert result.is_teacher_finite_N.tolist() == [True, False, True, True, True, True, True]


def test_a_map_over_other_tokens_than_the_teachers_is_refused():
    with pytest.raises(GKDConfigError, match=r"one group for each of the 30 tokens .* got 31 groups"):
        token_divergence(LogitsSignal(logits(N, V, seed=1)), mapped(logits(N, W - 1, seed=2), a_map()))
    with pytest.raises(GKDConfigError, match="must predict over the same vocabulary"):
        token_divergence(LogitsSignal(logits(N, V - 1, seed=1)), mapped(logits(N, W, seed=2), a_map()))
    with pytest.raises(GKDConfigError, match="mode must be one of 'matched', 'next_byte', 'uld', 'gold'; got 'union'"):
        token_divergence(LogitsSignal(logits(N, V, seed=1)), mapped(logits(N, W, seed=2), a_map("union")))


def test_a_hidden_teacher_is_compared_with_a_student_of_logits_too():
    mapping = a_map()
    teacher = hidden(mapping, "teacher")
    student_NV = logits(N, V, seed=1)
    result = token_divergence(LogitsSignal(student_NV), MappedSignal(teacher, mapping))
    teacher_NW = teacher.head.logits(teacher.hidden_NH).detach()
    torch.testing.assert_close(result.values_N, expected(student_NV, teacher_NW, mapping))
    assert isinstance(teacher, HiddenSignal)


@pytest.mark.parametrize("mode", ["matched", "next_byte", "gold"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_large_logits_do_not_round_a_small_value(mode, beta):
    size = 200
    ids_M, group_V = torch.arange(4, size), torch.arange(size) % G
    mapping = VocabularyMap(ids_M, ids_M, group_V, group_V, G, mode, 0.0)
    student_NV = logits(N, size, seed=1, dtype=torch.float32) + 300
    teacher_NV = student_NV + logits(N, size, seed=2, dtype=torch.float32) / 300
    labels_N = torch.arange(N)
    actual, exact = (
        token_divergence(LogitsSignal(student), mapped(teacher, mapping), beta=beta, labels_N=labels_N)
        for student, teacher in ((student_NV, teacher_NV), (student_NV.double(), teacher_NV.double()))
    )
    torch.testing.assert_close(actual.values_N.double(), exact.values_N, rtol=1e-5, atol=7e-7)
    torch.testing.assert_close(actual.cross_entropy_N.double(), exact.cross_entropy_N, rtol=2e-7, atol=0)

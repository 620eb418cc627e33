"""The most probable tokens of each kind of predictions."""

import pytest
import torch

from gkd_trainer.report import predictions
from gkd_trainer.report.predictions import picked, top_tokens
from gkd_trainer.signals import (
    GroupedSignal,
    Head,
    HiddenSignal,
    LogitsSignal,
    MappedSignal,
    SummedSignal,
    TopKSignal,
    VocabularyMap,
)

N, H, V, K = 7, 5, 13, 3


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(predictions, "_TILE_ELEMENTS", 2 * V)


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(V + 2, H, generator=generator), softcap=5.0).sliced(V)
    return HiddenSignal(torch.randn(N, H, generator=generator), head)


@pytest.fixture
def logits():
    return LogitsSignal(3 * torch.randn(N, V, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def top_k(logits):
    log_p_NK, ids_NK = logits.logits_NV.log_softmax(dim=1).topk(K, dim=1)
    return TopKSignal(ids_NK, log_p_NK, V)


TARGETS = torch.tensor([0, 1, 12, 3, 4, 5, 6])
ALL = torch.arange(N)


def p_of(signal, temperature=1.0):
    logits_NV = signal.head.logits(signal.hidden_NH) if isinstance(signal, HiddenSignal) else signal.logits_NV
    return (logits_NV.double() / temperature).softmax(dim=1)


def check(found, p_NV, targets=TARGETS):
    expected = p_NV.topk(found.ids_NK.shape[1], dim=1)
    assert found.ids_NK.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.p_NK.double(), expected.values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.target_p_N.double(), p_NV.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_tokens_of_hidden_states_and_logits_are_those_of_the_softmax(hidden, logits, temperature):
    for signal in (hidden, logits):
        check(top_tokens(signal, ALL, TARGETS, 4, temperature), p_of(signal, temperature))


def test_a_bias_and_a_head_in_half_precision_are_projected_in_parts(hidden):
    bias = torch.randn(V + 2, generator=torch.Generator().manual_seed(2))
    head = Head(hidden.head.weight_VH.bfloat16(), bias, scale=0.5).sliced(V)
    signal = HiddenSignal(hidden.hidden_NH.bfloat16(), head)
    p_NV = (0.5 * (signal.hidden_NH.double() @ head.weight_VH[:V].double().T + bias[:V])).softmax(dim=1)
    check(top_tokens(signal, ALL, TARGETS, 4), p_NV)


def test_more_tokens_than_the_vocabulary_has_are_all_of_them(logits):
    assert top_tokens(logits, ALL, TARGETS, 99).ids_NK.shape == (N, V)


def test_a_top_k_teacher_knows_only_its_own_entries(top_k, logits):
    found = top_tokens(top_k, ALL, TARGETS, 5)
    assert found.ids_NK.tolist() == top_k.ids_NK.tolist()
    is_entry_N = (top_k.ids_NK == TARGETS[:, None]).any(dim=1)
    assert found.target_p_N.isnan().tolist() == (~is_entry_N).tolist()
    expected_N = p_of(logits).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.target_p_N.double()[is_entry_N], expected_N[is_entry_N])


def test_an_absent_entry_has_no_probability(top_k):
    sliced = top_k.sliced(6)
    found = top_tokens(sliced, ALL, TARGETS.clamp(max=5), K)
    is_there_NK = found.p_NK > 0
    assert (found.ids_NK[is_there_NK] < 6).all()
    assert not is_there_NK.all()


def test_a_sum_of_teachers_is_their_mixture_by_weight(hidden, logits):
    found = top_tokens(SummedSignal((hidden, logits), (1.0, 3.0)), ALL, TARGETS, 4)
    check(found, (p_of(hidden) + 3 * p_of(logits)) / 4)


def test_a_sum_with_a_top_k_teacher_does_not_guess_the_targets_probability(hidden, top_k):
    found = top_tokens(SummedSignal((hidden, top_k), (0.5, 0.5)), ALL, TARGETS, 4)
    assert found.target_p_N.isnan().all()
    p_NV = 0.5 * p_of(hidden)
    p_NV.scatter_add_(1, top_k.ids_NK, 0.5 * top_k.log_p_NK.exp().double())
    assert found.ids_NK.tolist() == p_NV.topk(4, dim=1).indices.tolist()


def test_a_teacher_with_another_vocabulary_is_shown_in_the_students_tokens(logits):
    # The teacher's token w is the student's 12 - w, and it lacks the student's last three and first two.
    student_ids_M = torch.arange(2, 10)
    mapping = VocabularyMap(student_ids_M, 12 - student_ids_M, torch.zeros(V).long(), torch.zeros(V).long(), 1)
    found = top_tokens(MappedSignal(logits, mapping), ALL, TARGETS, 4)
    p_NV = torch.zeros(N, V, dtype=torch.float64)
    p_NV[:, student_ids_M] = p_of(logits)[:, 12 - student_ids_M]
    assert found.ids_NK.tolist() == p_NV.topk(4, dim=1).indices.tolist()
    is_shared_N = (TARGETS >= 2) & (TARGETS < 10)
    assert found.target_p_N.isnan().tolist() == (~is_shared_N).tolist()
    expected_N = p_NV.gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.target_p_N.double()[is_shared_N], expected_N[is_shared_N])


def test_grouped_predictions_are_those_of_each_positions_teacher(hidden, logits):
    order_N = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    signal = GroupedSignal(order_N, (picked(hidden, order_N[:3]), picked(logits, order_N[3:])))
    p_NV = p_of(logits)
    p_NV[order_N[:3]] = p_of(hidden)[order_N[:3]]
    check(top_tokens(signal, ALL, TARGETS, 4), p_NV)
    index_n = torch.tensor([0, 2, 3, 6])
    for found in (
        top_tokens(signal, index_n, TARGETS[index_n], 4),
        top_tokens(picked(signal, index_n), torch.arange(4), TARGETS[index_n], 4),
    ):
        check(found, p_NV[index_n], TARGETS[index_n])


def test_a_group_of_fewer_top_tokens_leaves_the_rest_empty(top_k, logits):
    order_N = torch.arange(N)
    signal = GroupedSignal(order_N, (picked(top_k, order_N[:2]), picked(logits, order_N[2:])))
    found = top_tokens(signal, ALL, TARGETS, 5)
    assert (found.p_NK[:2, K:] == 0).all()
    assert (found.p_NK[2:] > 0).all()


def test_a_target_outside_the_vocabulary_has_no_known_probability(logits):
    found = top_tokens(logits, ALL, torch.tensor([V, 0, 0, 0, 0, 0, -100]), 2)
    assert found.target_p_N.isnan().tolist() == [True, *[False] * 5, True]


def test_no_positions_have_no_top_tokens(hidden, logits, top_k):
    none = torch.zeros(0, dtype=torch.long)
    for signal in (hidden, logits, top_k):
        assert top_tokens(signal, none, none, 2).ids_NK.shape == (0, 2)

"""Categories that two vocabularies have in common. Shapes as in maps.py."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.divergence import reference_jsd, token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.signals import LogitsSignal, VocabularyMap
from tests.divergence.maps import G, N, V, W, a_map, logits, mapped, over_groups, with_rest


def compared(student_NV, teacher_NW, mapping, **options):
    return token_divergence(LogitsSignal(student_NV), mapped(teacher_NW, mapping), **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", ["matched", "next_byte"])
def test_every_divergence_is_that_of_the_categories_probabilities(mode, divergence):
    mapping = a_map(mode, min_matched_mass=0.0)
    student_NV, teacher_NW = logits(N, V, seed=1).requires_grad_(), logits(N, W, seed=2)
    result = compared(student_NV, teacher_NW, mapping, divergence=divergence)
    q, p = student_NV.softmax(dim=1), teacher_NW.softmax(dim=1)
    if mode == "matched":
        categories = with_rest(q, mapping.student_ids_M), with_rest(p, mapping.teacher_ids_M)
    else:
        categories = over_groups(q, mapping.student_group_V), over_groups(p, mapping.teacher_group_W)
    entry = DIVERGENCES[divergence]
    numbers = {name: option.default for name, option in entry.options.items()} or {"beta": 0.5}
    values_N = entry.oracle(categories[1], categories[0], numbers)
    torch.testing.assert_close(result.values_N, values_N, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(each.sum(), student_NV)[0] for each in (result.values_N, values_N)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_fewer_categories_give_a_lower_bound(beta):
    """Of the divergence over a vocabulary that both have."""
    student_NV, teacher_NV = logits(N, V, seed=1), logits(N, V, seed=2)
    whole_N = reference_jsd(student_NV, teacher_NV, beta=beta)
    group_V = torch.arange(V) % G
    for mode in ("matched", "next_byte"):
        ids_M = torch.arange(4, V)
        mapping = VocabularyMap(ids_M, ids_M, group_V, group_V, G, mode, 0.0)
        values_N = compared(student_NV, teacher_NV, mapping, beta=beta).values_N
        assert (values_N >= 0).all()
        assert (values_N < whole_N).all()


def test_the_masses_and_entropies_are_those_of_the_categories():
    mapping = a_map(min_matched_mass=0.0)
    student_NV, teacher_NW = logits(N, V, seed=1), logits(N, W, seed=2)
    result = compared(student_NV, teacher_NW, mapping)
    q, p = (
        with_rest(student_NV.softmax(dim=1), mapping.student_ids_M),
        with_rest(teacher_NW.softmax(dim=1), mapping.teacher_ids_M),
    )
    torch.testing.assert_close(result.student_matched_mass_N, q[:, :-1].sum(dim=1))
    torch.testing.assert_close(result.teacher_matched_mass_N, p[:, :-1].sum(dim=1))
    torch.testing.assert_close(result.student_entropy_N, -(q * q.log()).sum(dim=1))
    torch.testing.assert_close(result.teacher_entropy_N, -(p * p.log()).sum(dim=1))


def test_models_whose_top_tokens_are_both_unmatched_do_not_agree():
    mapping = a_map(min_matched_mass=0.0)
    student_NV, teacher_NW = logits(2, V, seed=1), logits(2, W, seed=2)
    student_NV[0, mapping.student_rest[0]] = teacher_NW[0, mapping.teacher_rest[0]] = 30.0
    student_NV[1, mapping.student_ids_M[3]] = teacher_NW[1, mapping.teacher_ids_M[3]] = 30.0
    assert compared(student_NV, teacher_NW, mapping).agrees_N.tolist() == [False, True]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_vocabulary_inside_the_others_is_compared_over_its_own_tokens(beta):
    """Else a bucket that is impossible on one side would make the divergence infinite."""
    teacher_ids_M = torch.randperm(W, generator=torch.Generator().manual_seed(0))[:V]
    mapping = replace(a_map(), student_ids_M=torch.arange(V), teacher_ids_M=teacher_ids_M, min_matched_mass=0.0)
    student_NV, teacher_NW = logits(N, V, seed=1).requires_grad_(), logits(N, W, seed=2)
    result = compared(student_NV, teacher_NW, mapping, beta=beta)
    expected_N = reference_jsd(student_NV, teacher_NW[:, teacher_ids_M], beta=beta)
    torch.testing.assert_close(result.values_N, expected_N)
    gradients = [torch.autograd.grad(each.sum(), student_NV)[0] for each in (result.values_N, expected_N)]
    torch.testing.assert_close(*gradients)


def test_an_improbable_group_is_not_impossible():
    mapping = a_map("next_byte")
    student_NV, teacher_NW = logits(1, V, seed=1).float(), logits(1, W, seed=2).float()
    student_NV[:, mapping.student_group_V == 2] -= 300.0  # e^-300 is zero in float32
    [value] = compared(student_NV, teacher_NW, mapping, beta=0.0).values_N
    q, p = student_NV.double().log_softmax(dim=1), teacher_NW.double().log_softmax(dim=1)
    log_q, log_p = (
        torch.stack([each[0, group == index].logsumexp(0) for index in range(G)])
        for each, group in ((q, mapping.student_group_V), (p, mapping.teacher_group_W))
    )
    torch.testing.assert_close(value.double(), (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("threshold", "grouped"), [(0.0, 0), (1.0, N)])
def test_the_threshold_chooses_what_is_compared(threshold, grouped):
    result = compared(logits(N, V, seed=1), logits(N, W, seed=2), a_map(min_matched_mass=threshold))
    assert result.is_grouped_N.sum() == grouped


def test_nothing_in_common_is_compared_over_groups_alone():
    none = torch.empty(0, dtype=torch.long)
    mapping = replace(a_map(min_matched_mass=0.5), student_ids_M=none, teacher_ids_M=none)
    student_NV, teacher_NW = logits(N, V, seed=1), logits(N, W, seed=2)
    result = compared(student_NV, teacher_NW, mapping)
    torch.testing.assert_close(
        result.values_N, compared(student_NV, teacher_NW, replace(mapping, mode="next_byte")).values_N
    )
    assert result.is_grouped_N.all()

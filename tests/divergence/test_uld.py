"""Losses over sorted probabilities, also against TRL's. Shapes as in maps.py."""

import pytest
import torch

from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import LogitsSignal
from tests.divergence.maps import M, N, V, W, a_map, logits, mapped


def compared(student_NV, teacher_NW, mapping, **options):
    return token_divergence(LogitsSignal(student_NV), mapped(teacher_NW, mapping), **options)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("mode", "M"), [("uld", M), ("gold", M), ("gold", V)])
def test_the_mean_is_trls(mode, M, beta):
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    mapping = a_map(mode, M=M)
    student_NV, teacher_NW = logits(N, V, seed=1).requires_grad_(), logits(N, W, seed=2)
    loss = object.__new__(gold.ULDLoss)
    torch.nn.Module.__init__(loss)
    loss.beta, loss.hybrid_matched_weight, loss.hybrid_unmatched_weight = beta, None, None
    matched = (
        {} if mode == "uld" else dict(zip(mapping.teacher_ids_M.tolist(), mapping.student_ids_M.tolist(), strict=True))
    )
    loss._teacher_matched_ids, loss._student_matched_ids = set(matched), set(matched.values())
    loss.mapping_tensor = torch.tensor([matched.get(each, -1) for each in range(W)])
    theirs = loss._compute_hybrid_uld_loss(student_NV.softmax(dim=1), teacher_NW.softmax(dim=1))
    ours = compared(student_NV, teacher_NW, mapping, beta=beta).values_N.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    gradients = [torch.autograd.grad(each, student_NV)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_sorted_probabilities_do_not_tell_tokens_apart_but_matched_ones_do():
    student_NV = logits(N, V, seed=1)
    teacher_NV = student_NV.roll(1, dims=1)  # each token as probable as its neighbour
    for mode, is_zero in (("uld", True), ("matched", False)):
        mapping = a_map(mode, W=V, min_matched_mass=0.0)
        values_N = compared(student_NV, teacher_NV, mapping).values_N
        assert (values_N.abs() < 1e-12).all() == is_zero


def test_agreement_is_that_of_the_same_token():
    mapping = a_map("uld")
    student_NV, teacher_NW = logits(2, V, seed=1), logits(2, W, seed=2)
    student_NV[:, mapping.student_ids_M[3]] = 30.0
    teacher_NW[0, mapping.teacher_ids_M[3]] = teacher_NW[1, mapping.teacher_ids_M[4]] = 30.0
    assert compared(student_NV, teacher_NW, mapping).agrees_N.tolist() == [True, False]


def test_gold_takes_no_other_divergence():
    with pytest.raises(GKDConfigError, match="mode='gold' needs divergence='jsd'"):
        compared(logits(N, V, seed=1), logits(N, W, seed=2), a_map("gold"), divergence="skew_kl")

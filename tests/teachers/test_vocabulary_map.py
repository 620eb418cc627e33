"""Which tokens of a byte-level and a SentencePiece-like vocabulary are compared."""

import pytest
import torch

from gkd_trainer.signals import TopKSignal
from gkd_trainer.teachers.alignment import Aligner, matched_ids
from gkd_trainer.teachers.vocabulary_map import map_of, top_tokens_mapped
from tests.vocabularies import sentencepiece_backend, sentencepiece_like


@pytest.fixture(scope="module")
def aligner(byte_level):
    return Aligner(byte_level(), sentencepiece_like(sentencepiece_backend()))


@pytest.fixture(scope="module")
def mapping(aligner):
    return map_of(aligner, None, "matched", 0.9)


def test_every_matched_pair_is_in_the_map(aligner, mapping):
    pairs = zip(mapping.student_ids_M.tolist(), mapping.teacher_ids_M.tolist(), strict=True)
    assert list(pairs) == matched_ids(aligner)
    assert len(mapping.student_group_V) == aligner.student.size
    assert len(mapping.teacher_group_W) == aligner.teacher.size


def test_a_group_is_a_first_byte_on_both_sides_or_one_special_token(aligner, mapping):
    for tokens, groups in ((aligner.student, mapping.student_group_V), (aligner.teacher, mapping.teacher_group_W)):
        for token_id, group in enumerate(groups.tolist()):
            if tokens.length_V[token_id] and not tokens.is_special_V[token_id]:
                assert group == tokens.bytes_V[token_id][0]
    [(mine, theirs)] = aligner.special_ids.items()
    assert mapping.student_group_V[mine] == mapping.teacher_group_W[theirs] == 256
    assert (mapping.student_group_V == 256).sum() == (mapping.teacher_group_W == 256).sum() == 1


def test_no_group_is_on_one_side_alone(mapping):
    assert {*mapping.student_group_V.tolist()} == {*mapping.teacher_group_W.tolist()}
    assert int(mapping.student_group_V.max()) < mapping.groups


def test_tokens_beyond_the_teachers_head_are_left_out(aligner):
    mapping = map_of(aligner, 300, "matched", 0.9)
    assert len(mapping.teacher_group_W) == 300
    assert mapping.teacher_ids_M.max() < 300
    assert {*mapping.student_group_V.tolist()} == {*mapping.teacher_group_W.tolist()}


def test_a_map_of_fewer_of_the_students_tokens_keeps_their_pairs(mapping):
    sliced = mapping.sliced(100)
    is_kept = mapping.student_ids_M < 100
    assert len(sliced.student_group_V) == 100
    assert sliced.teacher_ids_M.tolist() == mapping.teacher_ids_M[is_kept].tolist()
    assert {*sliced.student_rest.tolist(), *sliced.student_ids_M.tolist()} == {*range(100)}
    assert mapping.sliced(10**6) is mapping


def test_top_tokens_become_the_students_and_the_others_count_as_the_rest(mapping):
    known, unknown = mapping.teacher_ids_M[[5, 7]].tolist(), mapping.teacher_rest[[0, 1]].tolist()
    ids_NK = torch.tensor([[known[0], unknown[0], known[1]], [unknown[1], 10**6, known[0]], [*unknown, 10**6]])
    log_p_NK = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.1], [0.6, 0.2, 0.1]]).log()
    signal = top_tokens_mapped(TopKSignal(ids_NK, log_p_NK, 10**6 + 1), mapping)
    p_NK = signal.log_p_NK.exp()
    assert signal.vocab_size == len(mapping.student_group_V)
    assert signal.ids_NK[0, [0, 2]].tolist() == mapping.student_ids_M[[5, 7]].tolist()
    torch.testing.assert_close(p_NK[0], torch.tensor([0.5, 0.0, 0.1]))
    torch.testing.assert_close(p_NK[1], torch.tensor([0.0, 0.0, 0.1]))
    torch.testing.assert_close(p_NK[2], torch.zeros(3))

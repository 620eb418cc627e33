"""Joining the results of blocks. Shapes: N tokens."""

import torch

from gkd_trainer.divergence import TokenDivergence


def result(start, stop, *, has_labels=True, has_top_k=True):
    values_N = torch.arange(start, stop, dtype=torch.float32)
    is_even_N = values_N % 2 == 0
    return TokenDivergence(
        values_N=values_N,
        cross_entropy_N=values_N + 10 if has_labels else None,
        student_entropy_N=values_N + 20,
        teacher_entropy_N=values_N + 30,
        agrees_N=is_even_N,
        is_teacher_finite_N=~is_even_N,
        is_finite_N=values_N > 2,
        teacher_mass_N=values_N + 40 if has_top_k else None,
        student_mass_N=values_N + 50 if has_top_k else None,
        loss_N=values_N + 60 if has_labels else None,
    )


def test_blocks_join_in_order_and_field_by_field():
    joined = TokenDivergence.concatenated([result(0, 3), result(3, 4), result(4, 9)])
    for name, expected_N in vars(result(0, 9)).items():
        assert torch.equal(getattr(joined, name), expected_N), name


def test_blocks_without_labels_join_to_one_without():
    joined = TokenDivergence.concatenated([result(0, 3, has_labels=False), result(3, 4, has_labels=False)])
    assert joined.cross_entropy_N is None


def test_blocks_of_whole_distributions_join_to_one_without_masses():
    joined = TokenDivergence.concatenated([result(0, 3, has_top_k=False), result(3, 4, has_top_k=False)])
    assert joined.teacher_mass_N is None
    assert joined.student_mass_N is None

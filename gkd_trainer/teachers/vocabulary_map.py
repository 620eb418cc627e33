"""Which tokens of two vocabularies are compared.

Shapes: V the student's tokens, W the teacher's, M tokens that both have, N tokens trained on, K top tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_trainer.models.token_bytes import TokenBytes
from gkd_trainer.signals import TopKSignal, VocabularyMap
from gkd_trainer.teachers.alignment import Aligner, matched_ids

_BYTES = 256


def map_of(aligner: Aligner, teacher_size: int | None, mode: str, min_matched_mass: float) -> VocabularyMap:
    """Return the map of two tokenizers' tokens, whose groups are tokens with the same first byte.

    Special tokens that match have groups of their own; all others are one group.

    Args:
        aligner: The tokenizers.
        teacher_size: The size of the teacher's head; None if unknown. Tokens beyond it are left out.
        mode: See `signals.MODES`.
        min_matched_mass: See `VocabularyMap`.
    """
    student, teacher = aligner.student, aligner.teacher
    W = teacher.size if teacher_size is None else min(teacher.size, teacher_size)
    pairs = [(mine, theirs) for mine, theirs in matched_ids(aligner) if theirs < W]
    student_ids_M, teacher_ids_M = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(dim=1)
    special = {mine: theirs for mine, theirs in aligner.special_ids.items() if theirs < W}
    other = _BYTES + len(special)
    student_group_V, teacher_group_W = (
        _groups(student, list(special), other),
        _groups(teacher, list(special.values()), other),
    )
    return VocabularyMap(
        student_ids_M,
        teacher_ids_M,
        *_common(student_group_V, teacher_group_W[:W], other),
        groups=other + 1,
        mode=mode,
        min_matched_mass=min_matched_mass,
    )


def _groups(tokens: TokenBytes, special_ids: list[int], other: int) -> Tensor:
    first = [
        data[0] if data and not is_special else other
        for data, is_special in zip(tokens.bytes_V, tokens.is_special_V.tolist(), strict=True)
    ]
    for place, token_id in enumerate(special_ids):
        first[token_id] = _BYTES + place
    return torch.tensor(first)


def _common(student_group_V: Tensor, teacher_group_W: Tensor, other: int) -> tuple[Tensor, Tensor]:
    """Return the groups; those of only one side are joined to others, since the other side can't predict them."""
    shared = set(student_group_V.tolist()) & set(teacher_group_W.tolist())
    joined_to = other if other in shared else min(shared, default=other)
    table = torch.tensor([group if group in shared else joined_to for group in range(other + 1)])
    return table[student_group_V], table[teacher_group_W]


def student_ids_of(mapping: VocabularyMap) -> Tensor:
    """Return the student's token for each of the teacher's W, -1 for one that the student lacks."""
    student_of_W = torch.full_like(mapping.teacher_group_W, -1)
    student_of_W[mapping.teacher_ids_M] = mapping.student_ids_M
    return student_of_W


def top_tokens_mapped(signal: TopKSignal, mapping: VocabularyMap) -> TopKSignal:
    """Return a teacher's top tokens as the student's; the probability of those that it lacks counts as the others'."""
    student_of_W = student_ids_of(mapping)
    W = len(student_of_W)
    ids_NK = student_of_W[signal.ids_NK.clamp(0, W - 1)].masked_fill(signal.ids_NK >= W, -1)
    log_p_NK = signal.log_p_NK.masked_fill(ids_NK < 0, -torch.inf)
    return TopKSignal(ids_NK.clamp_min(0), log_p_NK, len(mapping.student_group_V))

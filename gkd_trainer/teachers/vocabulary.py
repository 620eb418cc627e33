"""Check that student and teacher use the same tokens, and find over how many to compare them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from gkd_trainer.errors import GKDTeacherError

logger = logging.getLogger(__name__)

_NAMED = 5


def shared_vocabulary_size(
    student_size: int,
    teacher_size: int | None,
    student_vocabulary: Mapping[str, int] | None,
    teacher_vocabulary: Mapping[str, int] | None,
    pad_tokens: Collection[str] = (),
) -> int:
    """Return the number of tokens over which two models are compared.

    Heads of equal size are compared in full. Heads padded to different sizes are cut to the ids that the shared
    tokenizer uses.

    Args:
        student_size: Size of the student's head, including padding.
        teacher_size: Size of the teacher's head; None if unknown, which counts as the student's.
        student_vocabulary: The id of each token of the student's tokenizer; None if unknown.
        teacher_vocabulary: The same for the teacher.
        pad_tokens: Tokens only for padding (see `pad_tokens_of`), which an error names if only they differ.

    Raises:
        GKDTeacherError: The tokenizers differ, or a tokenizer is unknown and the sizes differ.
    """
    if teacher_size is None:
        teacher_size = student_size
    if student_vocabulary is None or teacher_vocabulary is None:
        missing = "student" if student_vocabulary is None else "teacher"
        if student_size != teacher_size:
            raise GKDTeacherError(
                f"the student predicts over {student_size} tokens and the teacher over {teacher_size}, and the "
                f"{missing}'s tokenizer is unknown, so the shared tokens can't be determined: pass "
                "processing_class to the trainer, and teacher=FrozenTeacher(model, tokenizer=...)"
            )
        logger.warning(
            "No tokenizer of the %s was found: only the equal vocabulary sizes (%d) suggest that both models use the "
            "same token ids.",
            missing,
            student_size,
        )
        return student_size
    if student_vocabulary != teacher_vocabulary:
        differing = {token for token, _ in student_vocabulary.items() ^ teacher_vocabulary.items()}
        if differing == (student_vocabulary.keys() ^ teacher_vocabulary.keys()) & {*pad_tokens}:
            raise GKDTeacherError(
                "the tokenizers of student and teacher differ only by an added pad token: "
                f"{difference(student_vocabulary, teacher_vocabulary)}. Padding is masked, so it needs no token: load "
                "that tokenizer again and set tokenizer.pad_token = tokenizer.eos_token, or pass the other tokenizer "
                "for both models (processing_class, and FrozenTeacher(model, tokenizer=...))"
            )
        raise GKDTeacherError(
            "student and teacher have different tokenizers, so their distributions are over different tokens: "
            f"{difference(student_vocabulary, teacher_vocabulary)}. Use a teacher with the student's tokenizer, or "
            "set teacher_vocabulary_mode='matched', which compares them where they read the same bytes "
            "(OtherTokenizerTeacher)"
        )
    if student_size == teacher_size:
        return student_size
    return min(student_size, teacher_size, max(student_vocabulary.values()) + 1)


def pad_tokens_of(*tokenizers: Any) -> set[str]:
    """Return the tokens that tokenizers, None for an unknown one, have only for padding."""
    known = [tokenizer for tokenizer in tokenizers if getattr(tokenizer, "pad_token", None) is not None]
    return {tokenizer.pad_token for tokenizer in known if tokenizer.pad_token != tokenizer.eos_token}


def difference(
    first: Mapping[str, int], second: Mapping[str, int], owners: tuple[str, str] = ("student", "teacher")
) -> str:
    """Return a description of how two tokenizers' maps differ, with examples; `owners` are whose they are."""
    moved = sorted(token for token in first.keys() & second.keys() if first[token] != second[token])
    parts = []
    if moved:
        examples = ", ".join(f"{token!r} ({first[token]} and {second[token]})" for token in moved[:_NAMED])
        parts.append(f"{len(moved)} tokens have different ids in {owners[0]} and {owners[1]}, such as {examples}")
    for owner, extra in zip(owners, (first.keys() - second.keys(), second.keys() - first.keys()), strict=True):
        if extra:
            examples = ", ".join(map(repr, sorted(extra)[:_NAMED]))
            parts.append(f"{len(extra)} tokens are only the {owner}'s, such as {examples}")
    return "; ".join(parts)

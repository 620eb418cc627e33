"""Whether student and teacher speak of the same tokens, and over how many of them they are compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gkd_trainer.errors import GKDTeacherError

logger = logging.getLogger(__name__)

_NAMED = 5


def shared_vocabulary_size(
    student_rows: int,
    teacher_rows: int | None,
    student_vocabulary: Mapping[str, int] | None,
    teacher_vocabulary: Mapping[str, int] | None,
) -> int:
    """Return over how many tokens two models are compared.

    Heads of equal size are compared whole. Heads padded to different sizes are cut to the ids that the shared
    tokenizer uses.

    Args:
        student_rows: Rows of the student's head, padding included.
        teacher_rows: Rows of the teacher's head; None where that is not known, which counts as the student's.
        student_vocabulary: The id of each token of the student's tokenizer; None where it is not known.
        teacher_vocabulary: The same of the teacher's.

    Raises:
        GKDTeacherError: The tokenizers differ, or their sizes do where a tokenizer is not known.
    """
    if teacher_rows is None:
        teacher_rows = student_rows
    if student_vocabulary is None or teacher_vocabulary is None:
        missing = "student" if student_vocabulary is None else "teacher"
        if student_rows != teacher_rows:
            raise GKDTeacherError(
                f"the student predicts over {student_rows} tokens and the teacher over {teacher_rows}, and the "
                f"{missing}'s tokenizer is unknown, so the shared tokens are too: pass "
                "processing_class to the trainer, and teacher=FrozenTeacher(model, tokenizer=...)"
            )
        logger.warning(
            "No tokenizer of the %s was found: that both models use the same ids for the same tokens rests on their "
            "equal vocabulary sizes (%d) alone.",
            missing,
            student_rows,
        )
        return student_rows
    if student_vocabulary != teacher_vocabulary:
        raise GKDTeacherError(
            "the teacher's tokenizer is not the student's, so that their distributions are over different tokens: "
            f"{_difference(student_vocabulary, teacher_vocabulary)}. Use a teacher with the student's tokenizer"
        )
    if student_rows == teacher_rows:
        return student_rows
    return min(student_rows, teacher_rows, max(student_vocabulary.values()) + 1)


def _difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    moved = sorted(token for token in student.keys() & teacher.keys() if student[token] != teacher[token])
    parts = []
    if moved:
        examples = ", ".join(f"{token!r} ({student[token]} and {teacher[token]})" for token in moved[:_NAMED])
        parts.append(f"{len(moved)} tokens have other ids in the student and the teacher, such as {examples}")
    for owner, extra in (
        ("student", student.keys() - teacher.keys()),
        ("teacher", teacher.keys() - student.keys()),
    ):
        if extra:
            examples = ", ".join(map(repr, sorted(extra)[:_NAMED]))
            parts.append(f"{len(extra)} tokens are the {owner}'s alone, such as {examples}")
    return "; ".join(parts)

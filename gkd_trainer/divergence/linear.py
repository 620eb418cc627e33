"""The divergence from final hidden states and heads, one block of tokens at a time.

Shapes: N tokens, V vocabulary, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_trainer.batch import HiddenSignal
from gkd_trainer.divergence.blocks import compare_in_blocks, with_upcast_head
from gkd_trainer.divergence.dense import dense_divergence
from gkd_trainer.divergence.result import TokenDivergence


def linear_divergence(
    student: HiddenSignal,
    teacher: HiddenSignal,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
    labels_N: Tensor | None = None,
    token_block: int | None = None,
    vocab_chunk: int | None = None,
) -> TokenDivergence:
    """Compare two models token by token from their final hidden states.

    The arguments are those of `loss.token_divergence`, which checks them. Logits exist for one block of
    tokens at a time and are made again in the backward pass. Gradients reach the student's hidden states,
    weight and bias, each in its own dtype, where they require one.
    """
    with torch.no_grad():
        teacher = with_upcast_head(teacher)

    def compare(student_logits_NV: Tensor, teacher_NG: Tensor, labels_N: Tensor | None) -> TokenDivergence:
        with torch.no_grad():
            teacher_logits_NV = teacher.head.logits(teacher_NG)
        return dense_divergence(
            student_logits_NV,
            teacher_logits_NV,
            beta=beta,
            temperature=temperature,
            scale=scale,
            labels_N=labels_N,
            vocab_chunk=vocab_chunk,
        )

    return compare_in_blocks(compare, student, teacher.hidden_NH.detach(), labels_N, token_block=token_block)

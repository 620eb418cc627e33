"""The divergence from final hidden states and heads, one block of tokens at a time.

Shapes: N tokens, V vocabulary, H the student's hidden width, G the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gkd_trainer.batch import HiddenSignal
from gkd_trainer.divergence.dense import dense_divergence
from gkd_trainer.divergence.result import TokenDivergence

_BLOCK_ELEMENTS = 2**24
"""Size of one block's logits under the default block: 64 MiB a side in float32."""


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
    # Upcast once a call and not once a block: the blocks' gradients of the weight then add up in float32 and
    # are rounded once, and the peak is the same, since every block needs the whole weight.
    student = _with_upcast_head(student)
    with torch.no_grad():
        teacher = _with_upcast_head(teacher)

    def score(student_NH: Tensor, teacher_NG: Tensor, labels_N: Tensor | None) -> TokenDivergence:
        student_logits_NV = student.head.logits(student_NH)
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

    block_size = token_block or max(1, _BLOCK_ELEMENTS // student.vocab_size)
    student_blocks = student.hidden_NH.split(block_size)
    teacher_blocks = teacher.hidden_NH.detach().split(block_size)
    labels_blocks: Sequence[Tensor | None] = (
        [None] * len(student_blocks) if labels_N is None else labels_N.split(block_size)
    )
    blocks = zip(student_blocks, teacher_blocks, labels_blocks, strict=True)
    if not torch.is_grad_enabled():
        return TokenDivergence.concatenated([score(*block) for block in blocks])
    return TokenDivergence.concatenated(
        [checkpoint(score, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    )


def _with_upcast_head(signal: HiddenSignal) -> HiddenSignal:
    head = signal.head
    both = torch.promote_types(signal.hidden_NH.dtype, head.weight_VH.dtype)
    dtype = torch.promote_types(both, torch.float32)
    # Without a copy where the dtype is already that one.
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return replace(signal, head=replace(head, weight_VH=head.weight_VH.to(dtype), bias_V=bias_V))

"""A student's hidden states compared one block of tokens at a time.

Shapes: N tokens (of a block, in what is called with one), V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gkd_trainer.batch import HiddenSignal
from gkd_trainer.divergence.result import TokenDivergence

_BLOCK_ELEMENTS = 2**24
"""Size of one block's logits under the default block: 64 MiB a side in float32."""


def compare_in_blocks(
    compare: Callable[..., TokenDivergence],
    student: HiddenSignal,
    *per_token: Tensor | None,
    token_block: int | None = None,
) -> TokenDivergence:
    """Return what `compare(student_logits_NV, *per_token)` gives of each block, joined.

    `per_token` are tensors whose first axis is N, or None, split like the hidden states. Logits exist for one
    block of `token_block` tokens at a time (None for a default) and are made again in the backward pass.
    """
    # Upcast once a call and not once a block: the blocks' gradients of the weight then add up in float32 and
    # are rounded once, and the peak is the same, since every block needs the whole weight.
    student = with_upcast_head(student)

    def compare_block(student_NH: Tensor, *per_token: Tensor | None) -> TokenDivergence:
        return compare(student.head.logits(student_NH), *per_token)

    block_size = token_block or max(1, _BLOCK_ELEMENTS // student.vocab_size)
    student_blocks = student.hidden_NH.split(block_size)
    others: list[Sequence[Tensor | None]] = [
        [None] * len(student_blocks) if tensor is None else tensor.split(block_size) for tensor in per_token
    ]
    blocks = zip(student_blocks, *others, strict=True)
    if not torch.is_grad_enabled():
        return TokenDivergence.concatenated([compare_block(*block) for block in blocks])
    return TokenDivergence.concatenated(
        [checkpoint(compare_block, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    )


def with_upcast_head(signal: HiddenSignal) -> HiddenSignal:
    """Return the signal with its head in the dtype of its logits, without a copy where it already is."""
    head = signal.head
    both = torch.promote_types(signal.hidden_NH.dtype, head.weight_VH.dtype)
    dtype = torch.promote_types(both, torch.float32)
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return replace(signal, head=replace(head, weight_VH=head.weight_VH.to(dtype), bias_V=bias_V))

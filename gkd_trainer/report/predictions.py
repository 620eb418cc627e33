"""The most probable tokens of a model's predictions at a few positions, without logits of all positions at once.

Shapes: N positions, n of them that are picked or in a tile, V vocabulary, K top tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd_trainer.signals import (
    GroupedSignal,
    HiddenSignal,
    LogitsSignal,
    MappedSignal,
    Signal,
    StudentSignal,
    SummedSignal,
    TopKSignal,
    plain_signals,
    scored_positions,
)

_TILE_ELEMENTS = 2**24
"""Number of probabilities, or of a head's upcast weights, that exist at once: 64 MiB in float32."""


@dataclass(frozen=True)
class TopTokens:
    """The K most probable tokens at N positions, most probable first, and the probability of one token at each.

    `p_NK` is 0 for an entry that is absent, whose id is meaningless. `target_p_N` is NaN if it is unknown, since a
    teacher gave only its top tokens.
    """

    ids_NK: Tensor
    p_NK: Tensor
    target_p_N: Tensor


def picked(signal: Signal, index_n: Tensor) -> Signal:
    """Return the predictions at some positions, int64 in ascending order."""
    if isinstance(signal, HiddenSignal):
        return HiddenSignal(signal.hidden_NH[index_n], signal.head)
    if isinstance(signal, LogitsSignal):
        return LogitsSignal(signal.logits_NV[index_n])
    if isinstance(signal, TopKSignal):
        return TopKSignal(signal.ids_NK[index_n], signal.log_p_NK[index_n], signal.vocab_size)
    if isinstance(signal, MappedSignal):
        inner = picked(signal.signal, index_n)
        assert isinstance(inner, HiddenSignal | LogitsSignal)
        return MappedSignal(inner, signal.mapping)
    if isinstance(signal, SummedSignal):
        terms = tuple(picked(term, index_n) for term in signal.terms)
        return SummedSignal(terms, signal.weights)
    slot_n = torch.argsort(signal.order_N)[index_n]
    orders, groups, start = [], [], 0
    for group, size in zip(signal.groups, _group_sizes(signal), strict=True):
        is_inside_n = (slot_n >= start) & (slot_n < start + size)
        orders.append(is_inside_n.nonzero()[:, 0])
        groups.append(picked(group, slot_n[is_inside_n] - start))
        start += size
    return GroupedSignal(torch.cat(orders), tuple(groups))


@torch.no_grad()
def top_tokens(signal: Signal, index_n: Tensor, target_n: Tensor, k: int, temperature: float = 1.0) -> TopTokens:
    """Return the most probable tokens at some positions.

    Args:
        signal: Predictions at N positions. A sum of teachers counts as the mixture of their distributions by weight. Of
            a teacher with another vocabulary, only the tokens that the student has too are known.
        index_n: [n] int64, the positions, ascending.
        target_n: [n] int64, the token at each of them whose probability is wanted.
        k: How many tokens; fewer if the vocabulary or the teacher's top tokens are.
        temperature: Positive; divides logits. A teacher's top tokens stay at temperature 1.
    """
    tile = max(1, _TILE_ELEMENTS // _width(signal))
    parts = [
        _top_tokens(picked(signal, index), target, k, temperature)
        for index, target in zip(index_n.split(tile), target_n.split(tile), strict=True)
    ]
    return TopTokens(
        torch.cat([part.ids_NK for part in parts]),
        torch.cat([part.p_NK for part in parts]),
        torch.cat([part.target_p_N for part in parts]),
    )


def _top_tokens(signal: Signal, target_N: Tensor, k: int, temperature: float) -> TopTokens:
    if isinstance(signal, GroupedSignal):
        return _of_groups(signal, target_N, k, temperature)
    if isinstance(signal, TopKSignal):
        return _of_top_tokens(signal, target_N, k)
    p_NV = _probabilities(signal, temperature)
    top = p_NV.topk(min(k, signal.vocab_size), dim=1)
    target_p_N = p_NV.gather(1, target_N.clamp(0, signal.vocab_size - 1)[:, None])[:, 0]
    is_known_N = (target_N < signal.vocab_size) & (target_N >= 0)
    if isinstance(signal, SummedSignal) and any(isinstance(term, TopKSignal | MappedSignal) for term in signal.terms):
        is_known_N = torch.zeros_like(is_known_N)
    elif isinstance(signal, MappedSignal):
        is_known_N &= torch.isin(target_N, signal.mapping.student_ids_M.to(target_N.device))
    return TopTokens(top.indices, top.values, target_p_N.masked_fill(~is_known_N, torch.nan))


def _probabilities(signal: Signal, temperature: float) -> Tensor:
    """Return the probabilities [n, V] of ungrouped predictions, in float32 or wider; a top-k teacher's rest is 0."""
    if isinstance(signal, SummedSignal):
        return torch.stack(
            [
                weight * _probabilities(term, temperature)
                for term, weight in zip(signal.terms, signal.weights, strict=True)
            ]
        ).sum(dim=0) / sum(signal.weights)
    if isinstance(signal, TopKSignal):
        p_nV = signal.log_p_NK.new_zeros(len(signal.ids_NK), signal.vocab_size)
        is_there_nK = signal.log_p_NK > -torch.inf
        ids_nK = signal.ids_NK.masked_fill(~is_there_nK, 0)
        return p_nV.scatter_add_(1, ids_nK, signal.log_p_NK.exp())
    if isinstance(signal, MappedSignal):
        p_nW, mapping = _probabilities(signal.signal, temperature), signal.mapping.to(_device(signal.signal))
        p_nV = p_nW.new_zeros(len(p_nW), signal.vocab_size)
        return p_nV.index_copy_(1, mapping.student_ids_M, p_nW[:, mapping.teacher_ids_M])
    assert not isinstance(signal, GroupedSignal)
    logits_nV = signal.logits_NV if isinstance(signal, LogitsSignal) else _projected(signal)
    dtype = torch.promote_types(logits_nV.dtype, torch.float32)
    return (logits_nV.to(dtype) / temperature).softmax(dim=1)


def _projected(signal: HiddenSignal) -> Tensor:
    """Return the logits [n, V] of a few positions; of a weight in half precision, only a part is upcast at once."""
    head = signal.head.cut()
    rows = max(1, _TILE_ELEMENTS // head.weight_VH.shape[1])
    biases = [None] * -(-len(head.weight_VH) // rows) if head.bias_V is None else head.bias_V.split(rows)
    # Autocast would round the projection to bfloat16.
    with torch.autocast(signal.hidden_NH.device.type, enabled=False):
        parts = [
            replace(head, weight_VH=weight, bias_V=bias).logits(signal.hidden_NH)
            for weight, bias in zip(head.weight_VH.split(rows), biases, strict=True)
        ]
    return torch.cat(parts, dim=1)


def _device(signal: StudentSignal) -> torch.device:
    return signal.hidden_NH.device if isinstance(signal, HiddenSignal) else signal.logits_NV.device


def _width(signal: Signal) -> int:
    """Return the largest vocabulary that a signal predicts over."""
    inner = [each.signal if isinstance(each, MappedSignal) else each for each in plain_signals(signal)]
    return max(signal.vocab_size, *(each.vocab_size for each in inner))


def _of_top_tokens(signal: TopKSignal, target_N: Tensor, k: int) -> TopTokens:
    p_NK = signal.log_p_NK.exp()
    top = p_NK.topk(min(k, p_NK.shape[1]), dim=1)
    is_target_NK = (signal.ids_NK == target_N[:, None]) & (p_NK > 0)
    target_p_N = (p_NK * is_target_NK).sum(dim=1).masked_fill(~is_target_NK.any(dim=1), torch.nan)
    return TopTokens(signal.ids_NK.gather(1, top.indices), top.values, target_p_N)


def _of_groups(signal: GroupedSignal, target_N: Tensor, k: int, temperature: float) -> TopTokens:
    result, start = _empty(target_N, k, len(target_N)), 0
    for group, size in zip(signal.groups, _group_sizes(signal), strict=True):
        index_n = signal.order_N[start : start + size]
        part = _top_tokens(group, target_N[index_n], k, temperature)
        width = part.ids_NK.shape[1]
        result.ids_NK[index_n, :width] = part.ids_NK
        result.p_NK[index_n, :width] = part.p_NK.to(result.p_NK.dtype)
        result.target_p_N[index_n] = part.target_p_N.to(result.target_p_N.dtype)
        start += size
    return result


def _group_sizes(signal: GroupedSignal) -> list[int]:
    return [scored_positions(group) for group in signal.groups]


def _empty(target_N: Tensor, k: int, N: int = 0) -> TopTokens:
    p_NK = torch.zeros(N, k, device=target_N.device)
    return TopTokens(torch.zeros_like(p_NK, dtype=torch.long), p_NK, p_NK.new_full((N,), torch.nan))

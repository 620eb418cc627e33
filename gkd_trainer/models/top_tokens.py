"""A model's most probable tokens, from its hidden states or logits, without all logits at once.

Shapes: N tokens trained on, R the tokens of a block, V vocabulary, K top tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gkd_trainer.divergence.projection import HALVES, Projection
from gkd_trainer.divergence.rows import tiles
from gkd_trainer.divergence.workspace import planned_tile, row_stride
from gkd_trainer.signals import HiddenSignal, StudentSignal, TopKSignal, scored_positions


@torch.no_grad()
def top_tokens(signal: StudentSignal, k: int) -> TopKSignal:
    """Return the `k` most probable tokens at each position, with log-probs in float32; `k` is at most V.

    Logits and log-probs of a block of positions fit into the loss's default workspace. A head in half precision is not
    converted at once: on CUDA, products with hidden states of its dtype are summed in float32, and elsewhere slices of
    it are converted.
    """
    first = signal.hidden_NH if isinstance(signal, HiddenSignal) else signal.logits_NV
    N = scored_positions(signal)
    ids_NK = torch.empty(N, k, dtype=torch.long, device=first.device)
    log_p_NK = torch.empty(N, k, dtype=torch.float32, device=first.device)
    block = max(1, planned_tile(N, signal.vocab_size, first.device))
    # Autocast would round the projection to bfloat16.
    with torch.autocast(first.device.type, enabled=False):
        for tile, logits_RV in _logits_in_blocks(signal, N, block):
            top_RK = logits_RV.log_softmax(dim=1).topk(k, dim=1)
            ids_NK[tile], log_p_NK[tile] = top_RK.indices, top_RK.values
    return TopKSignal(ids_NK, log_p_NK, signal.vocab_size)


def _logits_in_blocks(signal: StudentSignal, N: int, block: int) -> Iterator[tuple[slice, Tensor]]:
    if not isinstance(signal, HiddenSignal):
        for tile in tiles(N, block):
            yield tile, signal.logits_NV[tile].float()
        return
    hidden_NH, head = signal.hidden_NH, signal.head.cut()
    H, V = hidden_NH.shape[1], signal.vocab_size
    of_weight = head.weight_VH.dtype
    dtype = torch.promote_types(torch.promote_types(hidden_NH.dtype, of_weight), torch.float32)
    half = of_weight if hidden_NH.is_cuda and hidden_NH.dtype == of_weight and of_weight in HALVES else None
    # A slice that is converted is an eighth as large as a block's logits.
    project = Projection(head, dtype, max(1, block * V // (8 * H)), half)
    logits_RV = hidden_NH.new_empty(min(block, N), row_stride(V, hidden_NH.device), dtype=dtype)[:, :V]
    for tile in tiles(N, block):
        out_RV = logits_RV[: tile.stop - tile.start]
        project.logits(hidden_NH[tile], out_RV)
        yield tile, out_RV.float()

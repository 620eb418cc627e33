"""How much memory the tiled divergence may use, and the sizes of tiles and buffers that follow from it.

Shapes: N tokens, V vocabulary, K top tokens of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkd_trainer.divergence.projection import HALVES
from gkd_trainer.divergence.rows import tiles
from gkd_trainer.divergence.several import Term
from gkd_trainer.signals import HiddenSignal, TopKSignal

CPU_WORKSPACE_MB = 256
"""The default budget on the CPU. With less, at large vocabularies, moving weights takes longer than multiplying."""

WORKSPACE_MB = 1024
"""The default budget elsewhere, where larger products keep the device busy."""

CUDA_WORKSPACE_MB = 3072
"""The largest default budget on CUDA: about 2,000 tokens at a vocabulary of 152,000. Larger tiles are little faster."""

_CUDA_SHARE = 1 / 24
"""The share of a GPU's memory that the default budget may take: 3.3 of 80 GB, 1 of 24."""

_CUDA_TILE = 128
"""Tiles on CUDA have a multiple of this number of tokens, as the products' own tiles do."""

_CUDA_PADDING = 16
"""Rows of logits on CUDA start at a multiple of this number of elements, for loads and products of several at once."""

_RESERVE = 1 / 6
"""The share of the budget for everything but logits: temporaries, and chunks of a weight in another dtype."""

_TEMPORARIES = 16
"""How many temporaries an eager comparison has alive at once."""


@dataclass(frozen=True)
class Plan:
    """The dtype of the logits, the dtypes to which each side's products round, and the sizes that the budget allows.

    `half` is the student's dtype, `halves` those of each group's terms. `tile` is a number of tokens, of which tiles
    have a multiple of `multiple`; rows start at multiples of `padding` elements. `scratch` is the number of columns of
    a second buffer beside a tile's logits, `copies` the number of copies of these that a sum needs, `chunk` the number
    of vocabulary entries whose weights are converted at once, and `temporary` a number of elements.
    """

    dtype: torch.dtype
    half: torch.dtype | None
    halves: list[list[torch.dtype | None]]
    tile: int
    multiple: int
    padding: int
    scratch: int
    copies: int
    chunk: int
    temporary: int

    def stride(self, columns: int) -> int:
        """Return the number of elements from one row to the next."""
        return _rounded_up(columns, self.padding)


def row_stride(columns: int, device: torch.device) -> int:
    """Return the number of elements from one row of logits to the next."""
    return _rounded_up(columns, _padding(device))


def plan_for(
    student: HiddenSignal,
    groups: Sequence[tuple[Term, ...]],
    product_dtype: torch.dtype | None,
    token_block: int | None,
    workspace_mb: float | None,
) -> Plan:
    """Return the plan for a student and the terms of each group; the options are those of `loss.token_divergence`."""
    teachers = [[term.signal for term in group] for group in groups]
    of_top_tokens = [signal for group in teachers for signal in group if isinstance(signal, TopKSignal)]
    sides = [student, *(signal for group in teachers for signal in group if isinstance(signal, HiddenSignal))]
    dtype, V, device = torch.float32, student.vocab_size, student.hidden_NH.device
    padding = _padding(device)
    for signal in sides:
        for tensor in (signal.hidden_NH, signal.head.weight_VH):
            dtype = torch.promote_types(dtype, tensor.dtype)
    if workspace_mb is None:
        workspace_mb = default_workspace_mb(device)
    elements = workspace_mb * 2**20 / dtype.itemsize
    widest = max(1, *(signal.hidden_NH.shape[1] for signal in sides))
    half = _half(student, product_dtype, dtype)
    # For a teacher's logits, of which one with another vocabulary has another number, or the student's gradient rounded
    # to a half.
    of_half = 0 if half is None else -(-V // 2)
    scratch = _rounded_up(max([of_half, *(signal.vocab_size for signal in sides[1:])]), padding)
    # A sum's gradient, and from its third term on, the gradient of one term.
    copies = min(2, max(map(len, groups)) - 1)
    # Top tokens are compared for a whole tile at once.
    temporaries = _TEMPORARIES * max((signal.ids_NK.shape[1] for signal in of_top_tokens), default=0)
    tile, multiple = token_block, 1
    if tile is None:
        columns = _rounded_up(V, padding) * (1 + copies) + scratch + temporaries
        tile, multiple = _largest_tile(columns, elements, device)
    return Plan(
        dtype,
        half=half,
        halves=[
            [None if isinstance(signal, TopKSignal) else _half(signal, product_dtype, dtype) for signal in group]
            for group in teachers
        ],
        tile=tile,
        multiple=multiple,
        padding=padding,
        scratch=scratch,
        copies=copies,
        chunk=max(1, int(elements * _RESERVE / 4 / widest)),
        temporary=int(elements * _RESERVE * 3 / 4 / _TEMPORARIES),
    )


def planned_tile(N: int, V: int, device: torch.device) -> int:
    """Return the size of the largest tile when N tokens of two models are compared by default, in float32."""
    elements = default_workspace_mb(device) * 2**20 / torch.float32.itemsize
    largest, multiple = _largest_tile(2 * V, elements, device)
    return int(max(tile.stop - tile.start for tile in tiles(N, largest, multiple)))


def default_workspace_mb(device: torch.device) -> float:
    """Return the budget if none is given; on CUDA by the device's memory.

    Not by what is free: a resumed run, or one beside another process, would have other tiles, and round differently.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return min(CUDA_WORKSPACE_MB, max(CPU_WORKSPACE_MB, total * _CUDA_SHARE / 2**20))
    return CPU_WORKSPACE_MB if device.type == "cpu" else WORKSPACE_MB


def _half(signal: HiddenSignal, product_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype to which a side's products round their inputs, or None if they round nothing."""
    of_weight = signal.head.weight_VH.dtype
    if product_dtype is None and signal.hidden_NH.is_cuda and signal.hidden_NH.dtype == of_weight:
        product_dtype = of_weight  # nothing is rounded, and sums are still float32
    is_taken = product_dtype == torch.bfloat16 or (product_dtype in HALVES and signal.hidden_NH.is_cuda)
    return product_dtype if is_taken and dtype == torch.float32 else None


def _largest_tile(columns: int, elements: float, device: torch.device) -> tuple[int, int]:
    """Return the number of tokens that a budget of elements allows, and of what it is a multiple."""
    tile = max(1, math.floor(elements * (1 - _RESERVE) / columns))
    if device.type != "cuda" or tile < _CUDA_TILE:
        return tile, 1
    return tile - tile % _CUDA_TILE, _CUDA_TILE


def _padding(device: torch.device) -> int:
    return _CUDA_PADDING if device.type == "cuda" else 1


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

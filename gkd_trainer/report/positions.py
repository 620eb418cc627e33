"""The divergence by position in the completion: sums on the device, over every token trained on.

Shapes: B batch, L length, N tokens trained on, P bins of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_trainer.transfer import to_device
from gkd_trainer.types import TokenBatch

_SINGLE = 16
_BINS_PER_OCTAVE = 4
_OCTAVES = 10

_MAX_GAP = 8
"""A teacher with another tokenizer predicts only some tokens of a completion; between turns there are more."""

FIRST_POSITIONS = (
    *range(_SINGLE),
    *(round(_SINGLE * 2 ** (index / _BINS_PER_OCTAVE)) for index in range(_BINS_PER_OCTAVE * _OCTAVES + 1)),
)
"""The first position of each bin, from 0: single positions, then four bins for each doubling; the last is open."""


@dataclass(frozen=True)
class PositionMeans:
    """The mean divergence of the tokens in each bin that has any.

    `position` holds the first position of each bin, from 0; `divergence` is in its own unit; `tokens` counts them.
    """

    position: tuple[int, ...]
    divergence: tuple[float, ...]
    tokens: tuple[int, ...]


class PositionSums:
    """Collects one rank's sums between two log entries, for on- and off-policy samples, on the device."""

    def __init__(self) -> None:
        self._sums_2P2: Tensor | None = None
        self._first_P = torch.tensor(FIRST_POSITIONS)

    def clear(self) -> None:
        """Forget what was added."""
        self._sums_2P2 = None

    def add(self, batch: TokenBatch, divergence_N: Tensor) -> None:
        """Add the divergence of each token of a batch; values that are not finite are left out."""
        dtype = torch.float32 if divergence_N.device.type == "mps" else torch.float64
        divergence_N = divergence_N.detach().to(dtype)
        is_finite_N = divergence_N.isfinite()
        self._first_P = first_P = to_device(self._first_P, divergence_N.device)
        position_N = positions_in_runs(batch.rows_N, batch.columns_N, _samples_N(batch))
        bin_N = torch.bucketize(position_N, first_P, right=True) - 1
        is_on_policy_N = batch.is_on_policy_B[batch.rows_N].long()
        added_N2 = torch.stack([torch.where(is_finite_N, divergence_N, 0.0), is_finite_N.to(dtype)], dim=1)
        sums = torch.zeros(2 * len(first_P), 2, dtype=dtype, device=divergence_N.device)
        sums.index_add_(0, is_on_policy_N * len(first_P) + bin_N, added_N2)
        sums_2P2 = sums.view(2, len(first_P), 2)
        self._sums_2P2 = sums_2P2 if self._sums_2P2 is None else self._sums_2P2 + sums_2P2

    def read(self, device: torch.device, reduce: Callable[[Tensor], Tensor]) -> dict[str, PositionMeans]:
        """Return the means of "off_policy" and "on_policy" tokens since the last call, of those that have any.

        Args:
            device: The device of the sums, for a rank that has none.
            reduce: Sums a tensor over ranks; all must call this.
        """
        sums_2P2, self._sums_2P2 = self._sums_2P2, None
        if sums_2P2 is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums_2P2 = torch.zeros(2, len(FIRST_POSITIONS), 2, dtype=dtype, device=device)
        means = {}
        for name, bins in zip(("off_policy", "on_policy"), reduce(sums_2P2).tolist(), strict=True):
            filled = [(first, *sums) for first, sums in zip(FIRST_POSITIONS, bins, strict=True) if sums[1] > 0]
            if filled:
                firsts, totals, counts = zip(*filled, strict=True)
                divergence = tuple(total / count for total, count in zip(totals, counts, strict=True))
                means[name] = PositionMeans(firsts, divergence, tuple(map(int, counts)))
        return means


def positions_in_runs(rows_N: Tensor, columns_N: Tensor, samples_N: Tensor | None = None) -> Tensor:
    """Return the position of each token in its run of trained tokens, such as a turn or a completion.

    Untrained tokens inside a run count, _MAX_GAP of them in a row at most. `samples_N` numbers the samples of a packed
    row, each of which starts a run; None if each row is one sample.
    """
    index_N = torch.arange(len(rows_N), device=rows_N.device)
    if len(index_N) == 0:
        return index_N
    is_first_N = torch.ones_like(index_N, dtype=torch.bool)
    is_first_N[1:] = (rows_N[1:] != rows_N[:-1]) | (columns_N[1:] > columns_N[:-1] + 1 + _MAX_GAP)
    if samples_N is not None:
        is_first_N[1:] |= samples_N[1:] != samples_N[:-1]
    first_N = torch.where(is_first_N, index_N, 0).cummax(dim=0).values
    return columns_N - columns_N[first_N]


def _samples_N(batch: TokenBatch) -> Tensor | None:
    """Return which sample of its row each scored position belongs to; None without `position_ids`.

    Samples packed in a row are told apart by their position ids, which start again at 0.
    """
    position_ids = batch.model_inputs.get("position_ids")
    if not isinstance(position_ids, Tensor) or position_ids.shape[-2:] != batch.labels_BL.shape:
        return None
    position_ids_BL = position_ids.reshape(-1, *batch.labels_BL.shape)[0]
    return (position_ids_BL == 0).cumsum(dim=1)[batch.rows_N, batch.columns_N]

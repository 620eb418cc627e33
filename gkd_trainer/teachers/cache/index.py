"""Which stored row begins with given token ids.

Shapes: R rows of a cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from gkd_trainer.teachers.cache.shards import Ints, Keys, key_of, start_of


class RowIndex:
    """Finds rows by their token ids, in 24 bytes per row.

    Args:
        keys_R2: For each row, the key of its ids, and that of its ids up to its first stored position.
        ids_of: Returns the ids of a row.
    """

    def __init__(self, keys_R2: Keys, ids_of: Callable[[int], Ints]) -> None:
        self._ids_of = ids_of
        self._whole, self._start = (_KeyColumn(keys_R2[:, column]) for column in range(2))
        self._in_order: dict[int, list[int]] = {}

    def rows(self, ids: Ints, first_position: int) -> Iterator[int]:
        """Yield the rows that begin with all `ids` but the last, those with exactly these ids first.

        A prediction does not depend on the token that it predicts, the last of `ids`. A row whose first stored position
        is not `first_position` is only found if it has exactly these ids.
        """
        for row in self._whole.rows(key_of(ids)):
            if np.array_equal(self._ids_of(row), ids):
                yield row
        context = _in_order_of_ids(ids[:-1])
        start = key_of(start_of(ids, first_position))
        candidates = self._start.rows(start)
        if len(candidates) > 1:
            candidates = self._sorted(start, candidates)
        first = bisect_left(candidates, context, key=self._sort_key)
        for row in candidates[first:]:
            if not self._sort_key(row).startswith(context):
                return
            yield row

    def _sorted(self, start: int, rows: list[int]) -> list[int]:
        """Return rows with the same start sorted by their ids, so that those with the same beginning are neighbours."""
        if start not in self._in_order:
            self._in_order[start] = sorted(rows, key=self._sort_key)
        return self._in_order[start]

    def _sort_key(self, row: int) -> bytes:
        return _in_order_of_ids(self._ids_of(row))


class _KeyColumn:
    """Rows by one of their keys."""

    def __init__(self, keys_R: npt.NDArray[np.uint64]) -> None:
        self._order_R = keys_R.argsort(kind="stable").astype(np.uint32)
        self._keys_R = keys_R[self._order_R]

    def rows(self, key: int) -> list[int]:
        """Return the rows with a key."""
        wanted = np.uint64(key)
        first, end = (int(self._keys_R.searchsorted(wanted, side)) for side in ("left", "right"))
        rows: list[int] = self._order_R[first:end].tolist()
        return rows


def _in_order_of_ids(ids: Ints) -> bytes:
    """Return bytes that compare as the ids do."""
    return ids.astype(">u4").tobytes()

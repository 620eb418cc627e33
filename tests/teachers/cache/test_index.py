"""Rows are found by their tokens, whole or as the beginning of a longer one."""

import numpy as np
import pytest

from gkd_trainer.teachers.cache.index import RowIndex
from gkd_trainer.teachers.cache.shards import key_of

# Two pairs with the same start (up to their first position), one of them within the other.
IDS = [np.array(ids, np.int32) for ids in ([4, 5, 6, 7], [4, 5, 6, 9, 2], [4, 5, 8], [1, 2], [4, 5, 6, 9], [1, 3])]
FIRST = [1, 1, 1, 0, 1, 0]


def index_of(keys=None):
    if keys is None:
        keys = [[key_of(ids), key_of(ids[: first + 1])] for ids, first in zip(IDS, FIRST, strict=True)]
    return RowIndex(np.array(keys, np.uint64), IDS.__getitem__)


def found(index, ids, first):
    return list(dict.fromkeys(index.rows(np.array(ids, np.int32), first)))


@pytest.mark.parametrize(
    ("ids", "first", "rows"),
    [
        ([4, 5, 6, 7], 1, [0, 4, 1]),  # the last token is not read for its prediction
        ([4, 5, 6], 1, [2, 0, 4, 1]),
        ([4, 5, 6, 9], 1, [4, 0, 1]),
        ([4, 5, 6, 9, 3], 1, [4, 1]),
        ([4, 5, 6, 9, 2, 2], 1, [1]),
        ([4, 5, 6, 9, 2, 2, 2], 1, []),
        ([1, 9], 0, [3, 5]),
        ([1, 2, 9], 0, [3]),
        ([4, 5, 6, 7], 2, [0]),  # of another first position, only the very same
        ([5, 6, 7], 1, []),
    ],
)
def test_rows_that_begin_with_the_tokens_are_found(ids, first, rows):
    index = index_of()
    assert sorted(found(index, ids, first)) == sorted(rows)
    assert found(index, ids, first) == found(index, ids, first)  # also once the rows of a start are sorted


def test_keys_that_are_equal_by_chance_do_no_harm(monkeypatch):
    monkeypatch.setattr("gkd_trainer.teachers.cache.index.key_of", lambda ids: 7)
    index = index_of([[7, 7]] * len(IDS))
    for row, (ids, first) in enumerate(zip(IDS, FIRST, strict=True)):
        assert found(index, ids, first)[0] == row
    assert found(index, [4, 5, 6, 9, 2, 2, 2], 1) == []


def test_an_index_of_many_rows_takes_few_bytes_per_row():
    keys_R2 = np.random.default_rng(0).integers(2**63, size=(10_000, 2), dtype=np.uint64)
    index = RowIndex(keys_R2, IDS.__getitem__)
    columns = (index._whole, index._start)
    assert sum(column._keys_R.nbytes + column._order_R.nbytes for column in columns) == 24 * 10_000

"""Rows in a file: unchanged, or an error."""

import numpy as np
import pytest

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers.cache.shards import Row, Shard, key_of, write_shard

ROWS = [
    Row(np.array([5, 6, 7], np.int32), np.array([0, 1], np.int32), b"first"),
    Row(np.array([9, 8], np.int32), np.array([0], np.int32), b""),
    Row(np.array([2**30, 0, 4, 4], np.int32), np.array([2], np.int32), bytes(300)),
]


def as_tuple(row):
    return row.ids.tolist(), row.positions.tolist(), row.payload


def all_rows(folder, entry):
    shard = Shard(folder, entry)
    return [shard.row(index) for index in range(entry.rows)]


@pytest.fixture
def entry(tmp_path):
    return write_shard(tmp_path / "shard", ROWS)


def test_rows_are_read_as_they_were_written_in_any_order(entry, tmp_path):
    shard = Shard(tmp_path, entry)
    assert (entry.rows, entry.positions, entry.size) == (3, 4, (tmp_path / "shard").stat().st_size)
    for index in (2, 0, 1):
        assert as_tuple(shard.row(index)) == as_tuple(ROWS[index])
        assert shard.keys_R2[index].tolist() == [
            key_of(ROWS[index].ids),
            key_of(ROWS[index].ids[: ROWS[index].positions[0] + 1]),
        ]


def test_any_byte_that_is_edited_is_noticed(entry, tmp_path):
    path = tmp_path / "shard"
    written = path.read_bytes()
    for place in range(0, len(written), 3):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(GKDTeacherError, match=r"shard is damaged: .*Run the `gkd-trainer cache` command"):
            all_rows(tmp_path, entry)


def test_a_shard_that_was_cut_short_is_refused(entry, tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GKDTeacherError, match=f"it must have {entry.size} bytes, but has {entry.size - 1}"):
        Shard(tmp_path, entry)
    path.unlink()
    with pytest.raises(GKDTeacherError, match="it can't be read"):
        Shard(tmp_path, entry)


def test_rows_of_the_same_tokens_differ_by_their_positions():
    row = ROWS[0]
    other = Row(row.ids, row.positions[1:], row.payload)
    assert row.identity != other.identity
    assert row.identity == Row(row.ids, row.positions, b"another").identity
    assert row.checksum != Row(row.ids, row.positions, b"another").checksum

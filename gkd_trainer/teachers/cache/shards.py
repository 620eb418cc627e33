"""A shard: a safetensors file of rows, each with its token ids, the positions that are stored, and their values.

Rows are checked one by one when they are read, so that opening a shard reads only its table: the checksum of each row,
where it ends, and the keys to find it by. The checksum of that table is in the manifest.

Shapes: R rows of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gkd_trainer.teachers.cache.format import ShardEntry, damaged, write_aside

_TABLE = ("checksums", "ids_end", "positions_end", "payload_end", "keys")
"""The tensors that have one entry per row."""

_CHECKSUM_BYTES = 16

Ints = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Row:
    """A row as it is stored: token ids, the positions whose predictions are stored (ascending), and their bytes.

    `ids` go up to the last token that a stored position predicts.
    """

    ids: Ints
    positions: Ints
    payload: bytes

    @property
    def identity(self) -> bytes:
        """A digest of the token ids and positions."""
        return _row_digest(self.ids, self.positions, b"")

    @property
    def checksum(self) -> bytes:
        """A digest of all of the row."""
        return _row_digest(self.ids, self.positions, self.payload)


def key_of(ids: Ints) -> int:
    """Return 64 bits of a digest of token ids. Two rows may have one key by chance: compare their ids."""
    return int.from_bytes(hashlib.blake2b(_bytes_of(ids), digest_size=8).digest(), "little")


def start_of(ids: Ints, first_position: int) -> Ints:
    """Return the token ids up to a row's first stored position; a row is also found by their key."""
    return ids[: first_position + 1]


def write_shard(path: Path, rows: Sequence[Row]) -> ShardEntry:
    """Write rows to a file, complete or not at all, and return its entry in the manifest."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "ids": np.concatenate([row.ids for row in rows]).astype(np.int32),
        "positions": np.concatenate([row.positions for row in rows]).astype(np.int32),
        "payload": np.frombuffer(b"".join(row.payload for row in rows), np.uint8),
        "ids_end": np.cumsum([len(row.ids) for row in rows], dtype=np.int64),
        "positions_end": np.cumsum([len(row.positions) for row in rows], dtype=np.int64),
        "payload_end": np.cumsum([len(row.payload) for row in rows], dtype=np.int64),
        "checksums": np.frombuffer(b"".join(row.checksum for row in rows), np.uint8).reshape(-1, _CHECKSUM_BYTES),
        "keys": np.array(
            [[key_of(row.ids), key_of(start_of(row.ids, int(row.positions[0])))] for row in rows], np.uint64
        ),
    }
    write_aside(path, lambda partial: save_file(tensors, partial))
    size = path.stat().st_size
    table = {name: tensors[name] for name in _TABLE}
    checksum = _table_digest(_header(path), table)
    return ShardEntry(file=path.name, rows=len(rows), positions=len(tensors["positions"]), size=size, checksum=checksum)


class Shard:
    """A shard, mapped into memory: only the rows that are read take any.

    Args:
        folder: The cache.
        entry: The shard's entry in the manifest.

    Raises:
        GKDTeacherError: The file is not there, was cut short, or its table was changed.
    """

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.path, self.entry = folder / entry.file, entry
        try:
            size = self.path.stat().st_size
            if size != entry.size:
                raise damaged(self.path, f"it must have {entry.size} bytes, but has {size}")
            file: Any = safe_open(self.path, framework="numpy")
            self._file = file
            table = {name: file.get_tensor(name) for name in _TABLE}
            checksum = _table_digest(_header(self.path), table)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise damaged(self.path, f"it can't be read ({error})") from error
        if checksum != entry.checksum:
            raise damaged(self.path, "the checksum of its table does not match the manifest's")
        self.keys_R2: Keys = table["keys"]

    def ids(self, index: int) -> Ints:
        """Return the token ids of a row, not checked."""
        ids: Ints = self._slice("ids", index)
        return ids

    def positions(self, index: int) -> Ints:
        """Return the stored positions of a row, not checked."""
        positions: Ints = self._slice("positions", index)
        return positions

    def row(self, index: int) -> Row:
        """Return a row; raise GKDTeacherError if it was changed."""
        row = Row(self._slice("ids", index), self._slice("positions", index), self._slice("payload", index).tobytes())
        if row.checksum != self._file.get_slice("checksums")[index : index + 1].tobytes():
            raise damaged(self.path, f"the checksum of its row {index} does not match its contents")
        return row

    def _slice(self, name: str, index: int) -> Any:
        ends = self._file.get_slice(f"{name}_end")
        start = 0 if index == 0 else int(ends[index - 1 : index][0])
        return self._file.get_slice(name)[start : int(ends[index : index + 1][0])]


def _row_digest(ids: Ints, positions: Ints, payload: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for part in (_bytes_of(ids), _bytes_of(positions), payload):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _bytes_of(numbers: Ints) -> bytes:
    return np.ascontiguousarray(numbers, np.dtype("<i4")).tobytes()


def _header(path: Path) -> bytes:
    """Return the header of a safetensors file, which has the dtype, shape and place of each tensor."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _table_digest(header: bytes, table: dict[str, npt.NDArray[Any]]) -> str:
    found = hashlib.sha256(header)
    for name in _TABLE:
        found.update(np.ascontiguousarray(table[name]).tobytes())
    return found.hexdigest()

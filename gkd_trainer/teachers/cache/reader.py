"""Reading a cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gkd_trainer.signals import Head
from gkd_trainer.teachers.cache import compression
from gkd_trainer.teachers.cache.format import HEAD, VOCABULARY, Manifest, damaged, file_digest
from gkd_trainer.teachers.cache.index import RowIndex
from gkd_trainer.teachers.cache.kinds import HalfHidden, IntegerHidden, RowCodec, TopK, Values, is_half
from gkd_trainer.teachers.cache.shards import Ints, Shard
from gkd_trainer.teachers.prompt_scores import TokenSequence


@dataclass(frozen=True)
class SharedTensors:
    """What all rows of a cache share: the head, and the channels' mean and standard deviation [H] for integers."""

    head: Head | None
    mean_H: torch.Tensor | None = None
    std_H: torch.Tensor | None = None


class CacheReader:
    """The rows of a cache, mapped into memory; of an incomplete one, those that its manifest lists.

    Args:
        folder: The cache.
        manifest: Its manifest.

    Raises:
        GKDTeacherError: One of the cache's files was cut short or changed.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        check_files(folder, manifest)
        self.shared = load_shared(folder, manifest)
        self._codec = codec_of(manifest, self.shared)
        self._compression = manifest.compression
        self._shards = [Shard(folder, entry) for entry in manifest.shards]
        self._ends = np.array([0, *accumulate(entry.rows for entry in manifest.shards)])
        keys_R2 = np.concatenate([np.empty((0, 2), np.uint64), *(shard.keys_R2 for shard in self._shards)])
        self._index = RowIndex(keys_R2, self._ids_of)

    def read(self, sequence: TokenSequence) -> Values | None:
        """Return the values at the positions before a sequence's targets; None if no row has them.

        A longer row serves its prefixes: a prediction depends only on the tokens before it.

        Raises:
            GKDTeacherError: The row was changed.
        """
        for shard, number in self._candidates(sequence):
            row = shard.row(number)
            places = _places(row.positions, sequence)
            if places is None:
                continue
            content = compression.decompress(row.payload, self._codec.item_size, self._compression)
            values = self._codec.decode(content, len(row.positions))
            if len(places) == len(row.positions):
                return values
            return tuple(value[torch.from_numpy(places)] for value in values)
        return None

    def has(self, sequence: TokenSequence) -> bool:
        """Return whether `read` finds a row; its contents are not read or checked."""
        candidates = self._candidates(sequence)
        return any(_places(shard.positions(number), sequence) is not None for shard, number in candidates)

    def _candidates(self, sequence: TokenSequence) -> Iterator[tuple[Shard, int]]:
        ids = np.array(sequence.token_ids, np.int32)
        return map(self._place, self._index.rows(ids, int(sequence.targets_P[0]) - 1))

    def _place(self, index: int) -> tuple[Shard, int]:
        shard = int(self._ends.searchsorted(index, "right")) - 1
        return self._shards[shard], index - int(self._ends[shard])

    def _ids_of(self, index: int) -> Ints:
        shard, number = self._place(index)
        return shard.ids(number)


def _places(positions: Ints, sequence: TokenSequence) -> npt.NDArray[np.intp] | None:
    """Return where among a row's positions those before a sequence's targets are; None if the row lacks some."""
    wanted = sequence.targets_P - 1
    places = positions.searchsorted(wanted).clip(max=len(positions) - 1)
    return places if np.array_equal(positions[places], wanted) else None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise GKDTeacherError if a file other than the shards is missing or was changed."""
    for name, checksum in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if file_digest(path) != checksum:
            raise damaged(path, "its checksum does not match the manifest's")


def read_vocabulary(folder: Path, manifest: Manifest) -> dict[str, int] | None:
    """Return the ids of the tokens of the cached teacher's tokenizer; None if it is unknown."""
    if VOCABULARY not in manifest.files:
        return None
    try:
        vocabulary: dict[str, int] = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder / VOCABULARY, f"it can't be read ({error})") from error
    return vocabulary


def load_shared(folder: Path, manifest: Manifest) -> SharedTensors:
    """Return what all rows of a cache share; raise GKDTeacherError if it can't be read."""
    if HEAD not in manifest.files:
        return SharedTensors(None)
    try:
        tensors = load_file(folder / HEAD)
        head = Head(tensors["weight"], tensors.get("bias"), manifest.head_scale, manifest.head_softcap)
    except (OSError, SafetensorError, KeyError) as error:
        raise damaged(folder / HEAD, f"it can't be read ({error})") from error
    return SharedTensors(head, tensors.get("channel_mean"), tensors.get("channel_std"))


def codec_of(manifest: Manifest, shared: SharedTensors) -> RowCodec:
    """Return the codec of a cache's rows."""
    if manifest.kind == "topk":
        return TopK(manifest.width, has_wide_ids=(manifest.source.vocab_size or 2**32) > 2**16)
    dtype = getattr(torch, manifest.dtype)
    if manifest.kind == "hidden" and is_half(manifest.dtype):
        return HalfHidden(dtype, manifest.width)
    assert shared.mean_H is not None
    assert shared.std_H is not None
    return IntegerHidden(dtype, shared.mean_H, shared.std_H, item_size=1 if manifest.kind == "hidden_int8" else 2)

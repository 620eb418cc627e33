"""Writing a cache, so that a run that was killed at any moment can be continued.

Shapes: N positions of a batch, P positions of one row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
from safetensors.torch import save_file

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.signals import Head, HiddenSignal, Signal
from gkd_trainer.teachers.cache import compression
from gkd_trainer.teachers.cache.format import (
    HEAD,
    MANIFEST,
    PARTIAL,
    VOCABULARY,
    CacheSource,
    Kind,
    Manifest,
    ShardEntry,
    file_digest,
    read_manifest,
    refuse_another_served,
    tensor_digest,
    write_aside,
    write_manifest,
)
from gkd_trainer.teachers.cache.kinds import RowCodec, Values, channel_statistics, dtype_of, is_half, values_of
from gkd_trainer.teachers.cache.reader import SharedTensors, check_files, codec_of, load_shared
from gkd_trainer.teachers.cache.shards import Row, Shard, write_shard
from gkd_trainer.teachers.prompt_scores import TokenSequence, sequences_of
from gkd_trainer.types import TokenBatch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_SHARD = "rows-{:05d}.safetensors"
_MIB = 2**20


class CacheWriter:
    """Writes a teacher's predictions to a folder, shard by shard; a folder that has some rows already is continued.

    Use it in a `with` block, whose normal end marks the cache as complete. If the process ends otherwise, the rows of
    the last, incomplete shard are lost, and no others. Shards that were damaged are removed, so that their rows can be
    added again.

    Args:
        folder: The cache; made if it does not exist.
        source: What the cache is made from. A cache of anything else is refused.
        kind: "hidden" stores bfloat16 and float16 states unchanged, and float32 ones as 16-bit integers; "hidden_int8"
            takes half of that; "topk" stores the ids and log-probs of a teacher that gives its top tokens.
        vocabulary: The id of each token of the tokenizer; None if unknown.
        compress: "zstd" compresses rows without loss; "auto" does so for hidden states in bfloat16 and float16, which
            saves 30 % and 14 %, if the package zstandard is installed. Integers and top tokens shrink little.
        shard_mb: Size of a shard in MiB before compression (> 0). As much is held in memory.

    Raises:
        GKDConfigError: Another process writes this cache, or an option is invalid.
        GKDTeacherError: The folder's cache was made from something else, or its manifest is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        source: CacheSource,
        *,
        kind: Kind = "hidden",
        vocabulary: Mapping[str, int] | None = None,
        compress: Literal["auto", "none", "zstd"] = "auto",
        shard_mb: float = 256.0,
    ) -> None:
        if shard_mb <= 0:
            raise GKDConfigError(f"shard_mb must be above 0; got {shard_mb}")
        self._folder, self._source, self._kind = Path(folder), source, kind
        self._vocabulary, self._shard_bytes = vocabulary, shard_mb * _MIB
        self._compress = compress
        if compress == "zstd":
            compression.require()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._folder)
        self._waiting: list[tuple[TokenSequence, Values]] = []
        self._waiting_bytes = 0
        self._known: set[bytes] = set()
        self._manifest: Manifest | None = None
        self._shared: SharedTensors | None = None
        self._head: Head | None = None
        self._is_head_checked = False
        try:
            self._resume()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Mark the cache as complete, unless the block failed."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._release()

    @property
    def manifest(self) -> Manifest | None:
        """The manifest as it was written last; None before the first shard."""
        return self._manifest

    def has(self, sequence: TokenSequence) -> bool:
        """Return whether the cache has a row with these token ids and positions."""
        return _row(sequence, b"").identity in self._known

    def add(self, batch: TokenBatch, signal: Signal) -> None:
        """Add the predictions for a batch; rows that the cache has already are left out.

        Args:
            batch: A batch of token ids.
            signal: The teacher's answer to it, for exactly its scored positions.

        Raises:
            GKDTeacherError: The signal can't be stored as the cache's kind.
            GKDDataError: The batch holds more than token ids.
        """
        sequences = sequences_of(batch)
        values = values_of(signal, self._kind)
        if isinstance(signal, HiddenSignal):
            self._head = signal.head.cut()
        counts = [len(sequence.targets_P) for sequence in sequences]
        split = [value.split(counts) for value in values]
        for sequence, *row in zip(sequences, *split, strict=True):
            identity = _row(sequence, b"").identity
            if identity in self._known:
                continue
            self._known.add(identity)
            copied = tuple(value.clone() for value in row)  # not a view, which would keep the batch's
            self._waiting.append((sequence, copied))
            self._waiting_bytes += sum(value.nbytes for value in copied)
        if self._waiting_bytes >= self._shard_bytes:
            self._flush()

    def _resume(self) -> None:
        for path in self._folder.glob(f"*{PARTIAL}"):
            path.unlink()
        if not (self._folder / MANIFEST).is_file():
            listed: set[str] = set()
        else:
            manifest = read_manifest(self._folder)
            _require_same(self._folder, "kind", manifest.kind, self._kind)
            for name in manifest.source.differences(self._source):
                _require_same(self._folder, name, getattr(manifest.source, name), getattr(self._source, name))
            refuse_another_served(self._folder, manifest.source, self._source)
            check_files(self._folder, manifest)
            self._shared = load_shared(self._folder, manifest)
            intact = tuple(entry for entry in manifest.shards if self._is_intact(entry))
            if len(intact) < len(manifest.shards):
                manifest = manifest.model_copy(update={"shards": intact, "is_complete": False})
                write_manifest(self._folder, manifest)
            self._manifest = manifest
            listed = {entry.file for entry in intact}
        for path in self._folder.glob(_SHARD.format(0).replace("00000", "*")):
            if path.name not in listed:  # renamed, but killed before the manifest was
                path.unlink()

    def _is_intact(self, entry: ShardEntry) -> bool:
        try:
            shard = Shard(self._folder, entry)
            identities = [shard.row(index).identity for index in range(entry.rows)]
        except GKDTeacherError as error:
            logger.warning("%s Its %d rows will be scored again.", error, entry.rows)
            return False
        self._known.update(identities)
        return True

    def _finish(self) -> None:
        self._flush()
        if self._manifest is None or not self._manifest.shards:
            raise GKDDataError("expected at least one row with tokens to train on; there was none, so no cache is made")
        if not self._manifest.is_complete:
            self._manifest = self._manifest.model_copy(update={"is_complete": True})
            write_manifest(self._folder, self._manifest)

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._manifest is None:
            self._manifest = self._begin()
        manifest, shared = self._manifest, self._shared
        assert shared is not None
        first = self._waiting[0][1]
        _require_same(self._folder, "dtype", manifest.dtype, dtype_of(first, self._kind))
        _require_same(self._folder, "top_k" if self._kind == "topk" else "width", manifest.width, first[0].shape[1])
        if not self._is_head_checked:
            self._check_head(shared)
        codec = codec_of(manifest, shared)
        rows = [_encoded(sequence, values, codec, manifest.compression) for sequence, values in self._waiting]
        number = max((_number_of(entry) for entry in manifest.shards), default=-1) + 1
        entry = write_shard(self._folder / _SHARD.format(number), rows)
        self._manifest = manifest.model_copy(update={"shards": (*manifest.shards, entry), "is_complete": False})
        write_manifest(self._folder, self._manifest)
        self._waiting, self._waiting_bytes = [], 0

    def _check_head(self, shared: SharedTensors) -> None:
        """Raise GKDTeacherError if a continued cache has another head: a server's weights have no digest."""
        if shared.head is not None and self._head is not None:
            given, cached = (each.weight_VH.detach().cpu() for each in (self._head, shared.head))
            _require_same(
                self._folder, "head", (*cached.shape, tensor_digest(cached)), (*given.shape, tensor_digest(given))
            )
        self._is_head_checked = True

    def _begin(self) -> Manifest:
        """Write the files that all rows share, and return a manifest without rows."""
        rows, head = [values for _, values in self._waiting], self._head
        files = {}
        if self._vocabulary is not None:
            text = json.dumps(dict(self._vocabulary))
            write_aside(self._folder / VOCABULARY, lambda path: path.write_text(text, encoding="utf-8"))
            files[VOCABULARY] = file_digest(self._folder / VOCABULARY)
        dtype = dtype_of(rows[0], self._kind)
        is_half_hidden = self._kind == "hidden" and is_half(dtype)
        mean_H, std_H = (None, None) if self._kind == "topk" or is_half_hidden else channel_statistics(rows)
        has_zstd = self._compress == "zstd" or (
            self._compress == "auto" and is_half_hidden and compression.is_available()
        )
        if head is not None:
            tensors = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in (
                    ("weight", head.weight_VH),
                    ("bias", head.bias_V),
                    ("channel_mean", mean_H),
                    ("channel_std", std_H),
                )
                if tensor is not None
            }
            write_aside(self._folder / HEAD, lambda path: save_file(tensors, path))
            files[HEAD] = file_digest(self._folder / HEAD)
        self._shared = SharedTensors(head, mean_H, std_H)
        return Manifest(
            source=self._source,
            kind=self._kind,
            dtype=dtype,
            width=rows[0][0].shape[1],
            compression="zstd" if has_zstd else "none",
            head_scale=1.0 if head is None else head.scale,
            head_softcap=None if head is None else head.softcap,
            files=files,
        )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _number_of(entry: ShardEntry) -> int:
    return int(Path(entry.file).stem.removeprefix("rows-"))  # of more than five digits in a large cache


def _row(sequence: TokenSequence, payload: bytes) -> Row:
    return Row(np.array(sequence.token_ids, np.int32), (sequence.targets_P - 1).astype(np.int32), payload)


def _encoded(sequence: TokenSequence, values: Values, codec: RowCodec, method: compression.Compression) -> Row:
    try:
        content = codec.encode(values)
    except ValueError as error:
        raise GKDTeacherError(
            f"a row of {len(sequence.token_ids)} tokens, {sequence.token_ids[:8]}…, can't be cached: its {error}. "
            "Leave the row out, or correct the teacher"
        ) from error
    return _row(sequence, compression.compress(content, codec.item_size, method))


def _require_same(folder: Path, name: str, cached: object, given: object) -> None:
    if cached != given:
        unknown = " (its weights are unknown here, so its name counts)" if name == "teacher" else ""
        raise GKDTeacherError(
            f"the cache in {folder} was made with another {name}{unknown}: {cached!r} there, {given!r} now. Choose "
            "another folder, or delete that one"
        )


def _locked(folder: Path) -> BinaryIO | None:
    """Lock a cache for writing until the file that is returned is closed, or this process ends."""
    if fcntl is None:
        return None
    lock = (folder / _LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise GKDConfigError(
            f"another process writes the cache in {folder}: wait until it ends, choose another folder, or have each "
            "process write a part of the rows (--part, part of cache_predictions)"
        ) from None
    except OSError as error:
        logger.warning("%s can't be locked (%s): let no second process write it.", folder, error)
        lock.close()
        return None
    return lock

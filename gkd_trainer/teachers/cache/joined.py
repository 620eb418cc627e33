"""Several caches that are read as one: they must hold one teacher's predictions, in one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import Head
from gkd_trainer.teachers.cache.format import Manifest, read_manifest
from gkd_trainer.teachers.cache.kinds import Values
from gkd_trainer.teachers.cache.parts import folders_to_read
from gkd_trainer.teachers.cache.reader import CacheReader
from gkd_trainer.teachers.prompt_scores import TokenSequence
from gkd_trainer.teachers.served import NOISE

_OF_THE_ROWS = frozenset({"max_length", "train_on", "chat_template"})
"""What caches of several datasets may differ in: each must fit the run by itself."""


def read_manifests(folders: Iterable[Path]) -> dict[Path, Manifest]:
    """Return the manifests of caches by their folders, in order; a folder of parts stands for all of them.

    Raises:
        GKDTeacherError: A folder is no cache, parts of it are missing, a manifest was changed, or the caches can't be
            read as one.
    """
    manifests = {folder: read_manifest(folder) for given in folders for folder in folders_to_read(given)}
    if not manifests:
        raise GKDTeacherError("expected at least one folder of a cache; got none")
    [(first, expected), *others] = manifests.items()
    for folder, manifest in others:
        for name, one, other in _differences(expected, manifest):
            raise _refusal(first, folder, f"they differ in {name}: {one!r} and {other!r}")
        distance = expected.source.witness_distance(manifest.source)
        if not distance <= NOISE:
            raise _refusal(
                first,
                folder,
                f"the scores that their teachers gave a fixed text differ by {distance:.2f} (mean total variation; "
                f"rounding explains at most {NOISE})",
            )
    return manifests


class JoinedReader:
    """The rows of several caches; one that is in more than one is read from the first of them.

    Args:
        manifests: The caches' manifests, by folder, from `read_manifests`.

    Raises:
        GKDTeacherError: One of the files was cut short or changed, or the caches have different heads.
    """

    def __init__(self, manifests: Mapping[Path, Manifest]) -> None:
        self.head: Head | None = None
        self._readers: list[CacheReader] = []
        for folder, manifest in manifests.items():
            reader = CacheReader(folder, manifest)
            if not self._readers:
                self.head = reader.shared.head
            elif not _is_same(self.head, reader.shared.head):
                raise _refusal(next(iter(manifests)), folder, "their teachers have different heads")
            reader.shared = replace(reader.shared, head=self.head)  # a head may take gigabytes: one for all
            self._readers.append(reader)

    def read(self, sequence: TokenSequence) -> Values | None:
        """Return the values at the positions before a sequence's targets: see `CacheReader.read`."""
        found = (reader.read(sequence) for reader in self._readers)
        return next((values for values in found if values is not None), None)

    def has(self, sequence: TokenSequence) -> bool:
        """Return whether `read` finds a row; its contents are not read or checked."""
        return any(reader.has(sequence) for reader in self._readers)


def _differences(one: Manifest, other: Manifest) -> Iterator[tuple[str, object, object]]:
    """Yield the name and both values of each field in which caches that are read as one must not differ."""
    names = {"kind": "kind", "dtype": "dtype", "width": "top_k" if one.kind == "topk" else "width"}
    for field, name in {**names, "head_scale": "head_scale", "head_softcap": "head_softcap"}.items():
        if getattr(one, field) != getattr(other, field):
            yield name, getattr(one, field), getattr(other, field)
    for name in one.source.differences(other.source):
        if name not in _OF_THE_ROWS:
            yield name, getattr(one.source, name), getattr(other.source, name)


def _is_same(one: Head | None, other: Head | None) -> bool:
    if one is None or other is None:
        return one is other
    tensors = ((one.weight_VH, other.weight_VH), (one.bias_V, other.bias_V))
    return all(a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def _refusal(first: Path, other: Path, reason: str) -> GKDTeacherError:
    return GKDTeacherError(
        f"the caches in {first} and {other} can't be read as one: {reason}. Name only caches of one teacher, made with "
        "the same options"
    )

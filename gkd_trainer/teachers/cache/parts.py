"""The parts of a cache, each written by a process of its own: caches in folders such as capybara-7b/part-2-of-4."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.teachers.cache.format import MANIFEST, read_manifest


@dataclass(frozen=True, order=True)
class Part:
    """One of `count` parts of some rows: from row `number` on (counted from 1), each `count`-th.

    Raises GKDConfigError if there is no such part.
    """

    count: int
    number: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise GKDConfigError(f"part must be I/N, with I from 1 to N, such as 2/4; got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Return the part that is written as 2/4; raise GKDConfigError for other texts."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise GKDConfigError(f"part must be I/N, with I from 1 to N, such as 2/4; got {text!r}")
        return cls(number=int(found[1]), count=int(found[2]))

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"part-{self.number}-of-{self.count}"

    @property
    def rows(self) -> slice:
        """Which rows are its own."""
        return slice(self.number - 1, None, self.count)


def folder_to_write(folder: Path, part: Part | None) -> Path:
    """Return the folder in which a cache is written: that of a part, if one is given.

    Raises GKDConfigError if the folder holds a cache already that is divided otherwise.
    """
    parts = _parts_in(folder)
    if part is None and parts:
        raise GKDConfigError(
            f"{folder} holds a cache in {parts[0].count} parts: write each with --part (part of cache_predictions), or "
            "choose another folder"
        )
    if part is None:
        return folder
    if (folder / MANIFEST).is_file():
        raise GKDConfigError(
            f"{folder} holds a cache that is not divided, so part {part} can't be written there: choose another "
            "folder; runs read both by teacher_cache_dir"
        )
    if counts := {each.count for each in parts} - {part.count}:
        raise GKDConfigError(
            f"{folder} holds a cache in {min(counts)} parts, so part {part} can't be written there: keep their number, "
            "or choose another folder"
        )
    return folder / part.folder_name


def folders_to_read(folder: Path) -> list[Path]:
    """Return the folders of the parts of a cache; of one that is not divided, its own.

    Raises GKDTeacherError if parts are missing.
    """
    parts = _parts_in(folder)
    if not parts or (folder / MANIFEST).is_file():
        return [folder]
    counts = sorted({part.count for part in parts})
    if len(counts) > 1:
        raise GKDTeacherError(
            f"{folder} holds parts of several caches, of {' and '.join(map(str, counts))} parts: name the folders of "
            "those to read one by one"
        )
    expected = parts_of(counts[0])
    missing = [part for part in expected if not (folder / part.folder_name / MANIFEST).is_file()]
    if missing:
        raise GKDTeacherError(
            f"the cache in {folder} lacks {_listed(missing)} of {counts[0]} parts: write each with `gkd-trainer cache "
            f"--part {missing[0]}` and the options of the others, or name the folders of those to read one by one"
        )
    return [folder / part.folder_name for part in expected]


def progress(folder: Path, count: int) -> str:
    """Return how many of `count` parts of a cache are complete, and which are not."""
    expected = parts_of(count)
    left = [part for part in expected if not _is_complete(folder / part.folder_name)]
    done = f"{folder}: {count - len(left)} of {count} parts are complete"
    return f"{done}; still to be written: {_listed(left)}" if left else done


def parts_of(count: int) -> list[Part]:
    """Return all of `count` parts."""
    return [Part(number=number, count=count) for number in range(1, count + 1)]


def _parts_in(folder: Path) -> list[Part]:
    names = (path.name for path in folder.glob("part-*-of-*") if path.is_dir())
    found = (re.fullmatch(r"part-([1-9]\d*)-of-([1-9]\d*)", name) for name in names)
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    return sorted(Part(number=number, count=count) for number, count in numbers if number <= count)


def _is_complete(folder: Path) -> bool:
    try:
        return read_manifest(folder).is_complete
    except GKDTeacherError:  # there is none yet, or it was changed
        return False


def _listed(parts: Iterable[Part]) -> str:
    return ", ".join(map(str, parts))

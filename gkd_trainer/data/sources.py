"""Rows by name: a dataset on the hub, a file, or a folder of files, and which part of it to take."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gkd_trainer.data.gsm8k import INSTRUCTION, is_problem, to_conversation
from gkd_trainer.data.rows import has_format, no_format
from gkd_trainer.errors import GKDDataError, GKDError

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        option: The option that gave the name, for errors.
        name: A name on the hub, a file or a folder. An existing path is taken literally, whatever it contains.
        split: The split, or part of one, such as `train[:100]`. All rows of a file are its split `train`.
        config: The configuration of a dataset; a file has none.
        is_streaming: Whether to read the rows while they are used.
        file_splits: The names by which a file's only split may be called.

    Raises:
        GKDDataError: The source can't be loaded, as far as this is known without reading rows.
    """

    option: str
    name: str
    split: str
    config: str | None = None
    is_streaming: bool = False
    file_splits: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        path = Path(self.name)
        if self._is_file:
            if path.suffix not in _FILE_FORMATS:
                self._refuse(f"expected a file that ends in {', '.join(_FILE_FORMATS)}; got {self.name}")
            if self._split_name not in self.file_splits or "+" in self.split:
                self._refuse(
                    f"{self.name} is one file, which has no split {self.split!r}: give another file with "
                    "--eval_dataset, or take parts of this one, such as --train_split 'train[:90%]' and "
                    "--eval_split 'train[90%:]'"
                )
        elif not path.exists():
            if glob.has_magic(self.name):
                self._refuse(f"there is no file {self.name}, and patterns are not expanded: give one file, or a folder")
            if path.suffix in _FILE_FORMATS:
                self._refuse(f"there is no file {self.name}")
        if self.is_streaming and "[" in self.split:
            self._refuse(f"part of a split can't be streamed; got {self.split!r}: take all of it, or do not stream")

    def load(self) -> Any:
        """Return the rows; raise GKDDataError if they can't be read, naming the first line that is not JSON."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        path = Path(self.name)
        options: dict[str, Any] = {"split": self.split, "streaming": self.is_streaming}
        try:
            if self._is_file:
                files = {self._split_name: glob.escape(str(path.resolve()))}
                return load_dataset(_FILE_FORMATS[path.suffix], data_files=files, **options)
            if path.is_dir() and glob.has_magic(str(path.resolve())):
                options["data_files"] = self._escaped_files()
            return load_dataset(self.name, self.config, **options)
        except GKDDataError:
            raise
        except StopIteration:  # raised by `datasets` for an empty file
            self._refuse(f"expected at least one row; {self.name} is empty")
        except (OSError, TypeError, ValueError, DatasetsError) as error:  # datasets 5.0 raises TypeError for a row
            problem = self.first_broken_line()
            if problem is not None:
                raise GKDDataError(f"--{self.option}: {problem}") from error
            # "An error occurred while generating the dataset" says nothing; its cause does.
            reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
            raise GKDDataError(
                f"--{self.option}: could not load the split {self.split!r} of {self.name} "
                f"({type(reason).__name__}: {reason}). Expected a name on the hub, a .json, .jsonl, .parquet or .csv "
                "file, or a folder of them"
            ) from error

    def overlaps(self, rows: Any, other: RowSource) -> bool:
        """Return whether another source takes some of the same rows; `rows` is the result of this source's `load`."""
        from datasets import ReadInstruction

        if os.path.exists(self.name) and os.path.exists(other.name):
            is_same_place = os.path.samefile(self.name, other.name)
        else:
            is_same_place = (self.name, self.config) == (other.name, other.config)
        if not is_same_place:
            return False
        lengths = {str(name): split.num_examples for name, split in (rows.info.splits or {}).items()}
        if self._is_file:
            lengths = dict.fromkeys((*self.file_splits, *other.file_splits), lengths.get(self._split_name, 0))
        if "all" in (self.split, other.split):
            return True
        if self.is_streaming:  # only whole splits can be streamed
            return self.split == other.split
        mine, theirs = (
            [
                ("" if self._is_file else part.splitname, part.from_, part.to)
                for part in ReadInstruction.from_spec(split).to_absolute(lengths)
            ]
            for split in (self.split, other.split)
        )
        return any(
            split == other_split and max(begin, other_begin) < min(end, other_end)
            for split, begin, end in mine
            for other_split, other_begin, other_end in theirs
        )

    def first_broken_line(self) -> str | None:
        """Return which line of which file is not a JSON object, and why; None if there is none, or no JSON file."""
        path = Path(self.name)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        json_files = (file for file in files if _FILE_FORMATS.get(file.suffix) == "json" and file.is_file())
        problems = map(_first_broken_line, json_files)
        return next((problem for problem in problems if problem is not None), None)

    @property
    def _is_file(self) -> bool:
        return Path(self.name).is_file()

    @property
    def _split_name(self) -> str:
        return self.split.partition("[")[0]

    def _refuse(self, what: str) -> NoReturn:
        raise GKDDataError(f"--{self.option}: {what}")

    def _escaped_files(self) -> dict[str, list[str]]:
        """Return the files of a folder by split: `datasets` would take the folder's own brackets for a pattern."""
        from datasets.data_files import get_data_patterns
        from huggingface_hub import DatasetCard

        folder = Path(self.name).resolve()
        card = folder / "README.md"
        if (card.is_file() and DatasetCard.load(card).data.get("configs")) or (folder / ".huggingface.yaml").is_file():
            self._refuse(f"{self.name} declares its own splits, which needs a path without any of *?[]: rename it")
        escaped = glob.escape(str(folder))
        return {
            str(split): [f"{escaped}/{pattern}" for pattern in patterns]
            for split, patterns in get_data_patterns(escaped).items()
        }


def in_format(source: RowSource, rows: Any) -> Any:
    """Return loaded rows in a format of training: GSM8K's become conversations, as for `gkd-trainer compare`.

    Raises GKDDataError for columns that are not read, before any model is loaded. The first row decides.
    """
    with naming_broken_lines(source):
        first: Mapping[str, Any] = next(iter(rows), {})
    if not first or has_format(first):
        return rows
    if is_problem(first):
        return rows.map(_as_conversation, remove_columns=["question", "answer"])
    raise GKDDataError(f"--{source.option}: {no_format(first)}, or train from Python with a formatting_func")


def _as_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a problem as a conversation; a row that is none has nothing to read, so it is dropped and counted."""
    return to_conversation(row, INSTRUCTION) if is_problem(row) else {"messages": None, "ground_truth": None}


@contextmanager
def naming_broken_lines(*sources: RowSource | None) -> Iterator[None]:
    """Turn an error from a file that is read during use into a GKDDataError that names the broken line."""
    try:
        yield
    except GKDError:
        raise
    except (OSError, TypeError, ValueError) as error:
        for source in sources:
            problem = None if source is None else source.first_broken_line()
            if source is not None and problem is not None:
                raise GKDDataError(f"--{source.option}: {problem}") from error
        raise


def _first_broken_line(path: Path) -> str | None:
    with path.open("rb") as file:
        is_document = file.read(1) == b"["
    if is_document or path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            if is_document:
                line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                return f"{path}{line} is not JSON: {_reason(error)}"
        else:
            return None
    with path.open("rb") as file:
        for number, encoded in enumerate(file, start=1):
            try:
                text = encoded.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text, object_pairs_hook=_without_repeated_keys) if text else {}
            except ValueError as error:
                return f"{path}, line {number} is not JSON: {_reason(error)}"
            if not isinstance(row, dict):
                return f'{path}, line {number}: expected an object such as {{"prompt": "..."}}; got {text[:40]}'
    return None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at column {error.colno}"
    return str(error)

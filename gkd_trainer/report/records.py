"""The file in which a run keeps completions token by token: one line of JSON for each log entry, of bounded size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.positions import PositionMeans
from gkd_trainer.report.token_map import TokenMap

FILE_NAME = "_report.jsonl"
"""Its name in `output_dir`. Trainer leaves files that begin with _ out of what it pushes to the hub."""

FORMAT = 1
MAX_NUMBER = 1e300
"""Larger numbers count as infinite: charts could not compute with them."""

MAX_BYTES = 16 * 2**20
MAX_TOKENS = 512
"""How many tokens of a sample are kept."""


@dataclass(frozen=True)
class RunFacts:
    """The first line: the names of both models, the steps of the whole run, and its options of distillation.

    `started` is when the run began, in seconds since 1970; None if this is unknown.
    """

    student: str
    teacher: str
    max_steps: int
    options: Mapping[str, Any]
    started: float | None = None


@dataclass(frozen=True)
class Record:
    """A log entry.

    Attributes:
        step: the optimizer step that was logged.
        metrics: the entry's numbers by name, without those that are not finite.
        sampled_step: the optimizer step that the samples are from.
        samples: some of its samples.
        positions: the divergence by position since the last entry, of "on_policy" and "off_policy" tokens.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampled_step: int | None = None
    samples: tuple[TokenMap, ...] = ()
    positions: Mapping[str, PositionMeans] = field(default_factory=dict)

    def line(self) -> str:
        """Return it as a line of JSON."""
        return b"".join(_bytes_of(self, MAX_BYTES)).decode()

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Return the record of a line; raise GKDDataError if it is not one."""
        try:
            values = json.loads(line)
            sampled_step = values["sampled_step"]
            return cls(
                step=int(values["step"]),
                metrics=finite(values["metrics"]),
                sampled_step=None if sampled_step is None else int(sampled_step),
                samples=tuple(TokenMap.from_json(sample) for sample in values["samples"]),
                positions={str(name): _means(means) for name, means in values["positions"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, GKDDataError):
                raise
            raise GKDDataError(f"expected a JSON line of {FILE_NAME}; got something else ({error!r})") from error


@dataclass(frozen=True)
class Records:
    """What a file holds; `facts` is None if its first line is unreadable, `unreadable` counts lines that are."""

    facts: RunFacts | None
    records: tuple[Record, ...]
    unreadable: int


def read_records(path: Path) -> Records:
    """Return what a file holds; lines that can't be read, such as a last one cut off by a crash, are counted.

    Raises GKDDataError if the file is of a later format.
    """
    facts, records, unreadable = None, [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            try:
                if number == 0:
                    facts = _facts(line)
                elif line.strip():
                    records.append(Record.from_line(line))
            except _LaterFormatError:
                raise
            except GKDDataError:
                unreadable += 1
    return Records(facts, tuple(records), unreadable)


def finite(values: Mapping[Any, Any]) -> dict[str, float]:
    """Return the numbers by name, without those that are not finite, or that no float can hold."""
    return {str(name): float(value) for name, value in values.items() if _is_finite(value)}


class RecordFile:
    """Writes the file of a run; only one process may.

    Args:
        path: The file.
        max_bytes: The size that it keeps below: samples are thinned out evenly over the run, then whole entries. An
            entry takes an eighth of it at most: further samples are left out.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._size, self._lines = 0, list[_Line]()

    def start(self, facts: RunFacts, step: int) -> None:
        """Begin the file of a run; one that resumes after `step` steps keeps the entries up to there, and its start."""
        earlier: Sequence[Record] = ()
        if step > 0:
            held = read_records(self._path) if self._path.is_file() else Records(None, (), 0)
            earlier = [record for record in held.records if record.step <= step]
            facts = replace(facts, started=held.facts.started if held.facts else None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps({"format": FORMAT, **asdict(facts)}, allow_nan=False, default=str) + "\n"
        self._size, self._lines = len(first.encode()), []
        with self._replacing() as file:
            file.write(first.encode())
            for record in earlier:
                self._add(record, file)
        self._bound()

    def append(self, record: Record) -> None:
        """Add an entry; raise OSError if something else has changed the file."""
        with self._path.open("ab") as file:
            if file.tell() != self._size:
                raise OSError(f"expected {self._path} of {self._size} bytes; something else has changed it")
            self._add(record, file)
        self._bound()

    def _add(self, record: Record, file: BinaryIO) -> None:
        bare, samples = _bytes_of(record, self._max_bytes // 8)
        if len(bare) <= self._max_bytes // 8:
            file.write(bare + samples)
            self._lines.append(_Line(self._size, len(bare), len(samples), record.step, _kind(record)))
            self._size += len(bare) + len(samples)

    def _bound(self) -> None:
        """Halve a file that is too large: copy the bytes that stay, without reading what they say."""
        if self._size <= self._max_bytes:
            return
        kept, start = thinned(self._lines, self._max_bytes // 2), self._lines[0].start
        with self._path.open("rb") as old, self._replacing() as new:
            self._size = new.write(old.read(start))
            for index, line in enumerate(kept):
                old.seek(line.start)
                content = old.read(line.bare)
                content += old.read(line.samples) if line.samples > len(_NO_SAMPLES) else _NO_SAMPLES
                kept[index] = replace(line, start=self._size)
                self._size += new.write(content)
        self._lines = kept

    @contextmanager
    def _replacing(self) -> Iterator[BinaryIO]:
        """Write a new file that takes the place of the old one: a crash leaves either."""
        written = self._path.with_name(f"{self._path.name}.new")
        with written.open("wb") as file:
            yield file
        os.replace(written, self._path)


@dataclass(frozen=True)
class _Line:
    """Where a line of a file begins; its bytes without and of its samples; its step, and what kind of entry it is."""

    start: int
    bare: int
    samples: int
    step: int
    kind: str


def thinned(lines: Sequence[_Line], max_bytes: int) -> list[_Line]:
    """Return lines of this size at most, thinned out evenly over the run; the first and the last stay.

    Lines are dropped until they take half of it without their samples, then samples until all fit. Each kind is thinned
    out by itself, so that the rare ones stay.
    """
    kept, gap, span = list(lines), 1, max(line.step for line in lines) + 1
    while sum(line.bare for line in kept) > max_bytes // 2 and gap <= span:
        kept, gap = _apart(kept, gap), 2 * gap
    gap = 1
    while sum(line.bare + line.samples for line in kept) > max_bytes and gap <= span:
        with_samples = {line.start for line in _apart([line for line in kept if _has_samples(line)], gap)}
        kept = [line if line.start in with_samples else replace(line, samples=len(_NO_SAMPLES)) for line in kept]
        gap *= 2
    return kept


def _apart(lines: Sequence[_Line], gap: int) -> list[_Line]:
    """Return the lines that are at least `gap` steps behind the one before of their kind, and the last of each kind."""
    last = {(line.kind, _has_samples(line)): index for index, line in enumerate(lines)}
    kept, before = [], dict[tuple[str, bool], int]()
    for index, line in enumerate(lines):
        kind = (line.kind, _has_samples(line))
        if kind not in before or line.step - before[kind] >= gap or last[kind] == index:
            kept.append(line)
            before[kind] = line.step
    return kept


def _has_samples(line: _Line) -> bool:
    return line.samples > len(_NO_SAMPLES)


def _kind(record: Record) -> str:
    """Return which entries a record is one of: those of training, of an evaluation of a set, or any other."""
    if "loss" in record.metrics:
        return "loss"
    return next((name for name in sorted(record.metrics) if name.startswith("eval_") and name.endswith("_loss")), "")


_NO_SAMPLES = b',"sampled_step":null,"samples":[]}\n'


def _bytes_of(record: Record, max_bytes: int) -> tuple[bytes, bytes]:
    """Return the line of a record without samples, and its end, with as many as fit."""
    values = {
        "step": record.step,
        "metrics": finite(record.metrics),
        "positions": {name: asdict(means) for name, means in record.positions.items()},
    }
    bare = _json(values).removesuffix("}").encode()
    samples: list[str] = []
    size = len(bare) + 80
    for sample in record.samples:
        text = _json(sample.to_json())
        size += len(text) + 1  # ASCII
        if size > max_bytes:
            break
        samples.append(text)
    if not samples:
        return bare, _NO_SAMPLES
    return bare, f',"sampled_step":{_json(record.sampled_step)},"samples":[{",".join(samples)}]}}\n'.encode()


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class _LaterFormatError(GKDDataError):
    pass


def _facts(line: str) -> RunFacts:
    try:
        values = json.loads(line)
        if int(values["format"]) > FORMAT:
            raise _LaterFormatError(
                f"expected a {FILE_NAME} of format {FORMAT} or earlier; got format {values['format']}: update "
                "gkd_trainer"
            )
        return RunFacts(
            str(values["student"]),
            str(values["teacher"]),
            int(values["max_steps"]),
            dict(values["options"]),
            finite({"started": values.get("started")}).get("started"),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, _LaterFormatError):
            raise
        raise GKDDataError(f"expected the first line of {FILE_NAME}; got something else ({error!r})") from error


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= MAX_NUMBER


def _means(values: Any) -> PositionMeans:
    position, tokens = (tuple(int(value) for value in values[name]) for name in ("position", "tokens"))
    return PositionMeans(position, tuple(float(value) for value in values["divergence"]), tokens)

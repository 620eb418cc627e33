"""The file in which a run keeps completions token by token: one line of JSON for each log entry, of bounded size."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
        values = {
            "step": self.step,
            "metrics": finite(self.metrics),
            "sampled_step": self.sampled_step,
            "samples": [sample.to_json() for sample in self.samples],
            "positions": {name: asdict(means) for name, means in self.positions.items()},
        }
        return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"

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
        max_bytes: The size that it keeps below: completions are thinned out evenly over the run, then whole entries.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes

    def start(self, facts: RunFacts, step: int) -> None:
        """Begin the file of a run; one that resumes after `step` steps keeps the entries up to there, and its start."""
        earlier: Sequence[Record] = ()
        if step > 0:
            held = read_records(self._path) if self._path.is_file() else Records(None, (), 0)
            earlier = [record for record in held.records if record.step <= step]
            facts = replace(facts, started=held.facts.started if held.facts else None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(facts, earlier)

    def append(self, record: Record) -> None:
        """Add an entry."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.line())
            size = file.tell()
        if size > self._max_bytes:
            held = read_records(self._path)
            assert held.facts is not None  # this object has written them
            self._rewrite(held.facts, thinned(held.records, self._max_bytes // 2))

    def _rewrite(self, facts: RunFacts, records: Sequence[Record]) -> None:
        first = json.dumps({"format": FORMAT, **asdict(facts)}, allow_nan=False, default=str)
        written = self._path.with_name(f"{self._path.name}.new")
        with written.open("w", encoding="utf-8") as file:
            file.write(first + "\n")
            file.writelines(record.line() for record in records)
        os.replace(written, self._path)  # a crash leaves the old file or the new one


def thinned(records: Sequence[Record], max_bytes: int) -> list[Record]:
    """Return records of about this size at most, thinned out evenly over the run; the first and the last stay.

    Entries are dropped until they take half of it without their samples, then samples until all fit.
    """
    kept = [(record, replace(record, sampled_step=None, samples=())) for record in records]
    rest = sum(len(bare.line()) for _, bare in kept)
    while rest > max_bytes // 2 and len(kept) > 2:
        gaps = _gaps([bare.step for _, bare in kept])
        # One with samples goes last: only some have them.
        index = min(gaps, key=lambda index: (bool(kept[index][0].samples), gaps[index]))
        rest -= len(kept.pop(index)[1].line())
    found = [record for record, _ in kept]
    with_samples = [index for index, record in enumerate(found) if record.samples]
    total = sum(len(record.line()) for record in found)
    while total > max_bytes and len(with_samples) > 2:
        gaps = _gaps([found[index].step for index in with_samples])
        index = with_samples.pop(min(gaps, key=lambda place: gaps[place]))
        total -= len(found[index].line()) - len(kept[index][1].line())
        found[index] = kept[index][1]
    return found


def _gaps(steps: Sequence[int]) -> dict[int, int]:
    """Return the steps between the neighbours of each index, without the first and the last."""
    return {index: steps[index + 1] - steps[index - 1] for index in range(1, len(steps) - 1)}


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

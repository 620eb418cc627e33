"""The cells of a stage, single measurements: a worker process makes them, and each outcome is written at once.

A cell that fails, crashes or hangs costs its own result and no other. A cell for which too little time is left is
skipped, and the file says so.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.card import description

MEASURED, OUT_OF_MEMORY, NOT_MEASURED, FAILED, SKIPPED, WAITING = (
    "measured",
    "out of memory",
    "not measured",
    "failed",
    "skipped",
    "waiting",
)
"""What can come of a cell: NOT_MEASURED means that something it needs is not there, SKIPPED that time ran out."""

_LACK_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors of CUDA, cuBLAS and Triton say if the card is full, beside torch's own."""

_LONGEST = 6
"""How many times its expected duration a cell may take before it is stopped."""


@dataclass(frozen=True)
class Where:
    """The device, "cuda" or "cpu", and whether sizes are tiny, to try the code and not to measure anything."""

    device: str
    is_small: bool

    @property
    def torch_device(self) -> torch.device:
        """The device as torch's type."""
        return torch.device(self.device)

    def pick(self, full: Any, small: Any) -> Any:
        """Return the first value, or the second if sizes are tiny."""
        return small if self.is_small else full


@dataclass(frozen=True)
class Cell:
    """One measurement.

    `measure(where, **key)` returns its figures, as JSON takes them; `part` and `key` identify them in the results.
    `seconds` is about how long it takes on a GPU, with what it loads and compiles.
    """

    part: str
    measure: Callable[..., dict[str, Any]]
    seconds: float
    key: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The part and the values of the key."""
        return " ".join([self.part, *map(str, self.key.values())])


class NotMeasuredError(Exception):
    """Something that a cell needs is not there; the message says what."""


class Results:
    """The outcomes of a stage in a JSON file, which is whole at any time."""

    def __init__(self, file: Path, stage: str, cells: Sequence[Cell], where: Where) -> None:
        self._file = file
        self._outcomes: list[dict[str, Any]] = [
            {"part": cell.part, "key": dict(cell.key), "status": WAITING} for cell in cells
        ]
        self._head: dict[str, Any] = {
            "stage": stage,
            "device": where.device,
            "is_small": where.is_small,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "about": {},
        }
        self._write()

    @property
    def outcomes(self) -> Sequence[Mapping[str, Any]]:
        """The outcome of each cell, in order."""
        return self._outcomes

    def describe(self, about: Mapping[str, Any]) -> None:
        """Set what the results were measured on."""
        self._head["about"] = dict(about)
        self._write()

    def set(self, index: int, outcome: Mapping[str, Any]) -> None:
        """Set the outcome of a cell."""
        self._outcomes[index].update(outcome)
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**self._head, "cells": self._outcomes}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self._file)


def run_stage(stage: str, cells: Sequence[Cell], where: Where, folder: Path, minutes: float) -> bool:
    """Make the measurements of a stage, into `folder`/`stage`.json; return whether none failed."""
    deadline = time.monotonic() + 60 * minutes
    console = Console(highlight=False, soft_wrap=True)
    results = Results(folder / f"{stage}.json", stage, cells, where)
    workers = _Workers(where)
    try:
        about = workers.outcome(Cell("about", description, 60.0), 60 * minutes)
        results.describe(about.get("figures", about))
        for index, cell in enumerate(cells):
            left = deadline - time.monotonic()
            if left < cell.seconds and not where.is_small:
                why = f"it takes about {cell.seconds:.0f} s, and {max(left, 0):.0f} s of {minutes:g} minutes were left"
                outcome: Mapping[str, Any] = {"status": SKIPPED, "why": why}
            else:
                outcome = workers.outcome(cell, min(max(left, 1.0), max(60.0, _LONGEST * cell.seconds)))
            results.set(index, outcome)
            console.print(f"{stage} {index + 1}/{len(cells)} {cell.title}: {_line_of(outcome)}", markup=False)
    finally:
        workers.end()
    return not any(is_failure(outcome) for outcome in results.outcomes)


def is_failure(outcome: Mapping[str, Any]) -> bool:
    """Return whether a cell failed, or some of the tests that it ran."""
    return outcome["status"] == FAILED or bool(outcome.get("figures", {}).get("failed"))


def _line_of(outcome: Mapping[str, Any]) -> str:
    seconds = f" in {outcome['seconds']:.1f} s" if "seconds" in outcome else ""
    why = f": {outcome['why']}" if "why" in outcome else ""
    return f"{outcome['status']}{seconds}{why}"


class _Workers:
    """One worker process at a time; after a failure, whose cause may outlast it on the device, a new one."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._process: Any = None
        self._connection: Connection | None = None

    def outcome(self, cell: Cell, limit: float) -> dict[str, Any]:
        """Have a cell measured within `limit` seconds."""
        began = time.monotonic()
        if self._connection is None:
            self._begin()
        assert self._connection is not None
        try:
            self._connection.send(cell)
            if not self._connection.poll(limit):
                outcome = {"status": FAILED, "why": f"it was stopped after {limit:.0f} s"}
            else:
                outcome = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = {"status": FAILED, "why": f"its process ended with exit status {self._process.exitcode}"}
        outcome["seconds"] = round(time.monotonic() - began, 2)
        if outcome["status"] == FAILED:
            self.end()
        return outcome

    def end(self) -> None:
        """End the worker, if there is one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.join(timeout=2)  # unless it is busy, it ends when the connection does
            if self._process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has not yet made its group
                    os.killpg(self._process.pid, signal.SIGKILL)  # with what it started
                self._process.kill()
                self._process.join(timeout=10)  # one that waits for the driver may not end
        self._process = self._connection = None

    def _begin(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, self._where))
        self._process.start()
        theirs.close()


def _serve(connection: Connection, where: Where) -> None:
    os.setsid()
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:  # the stage is over, or was killed
            return
        connection.send(_outcome(cell, where))
        # After the error, whose traceback holds the tensors of its frames.
        gc.collect()
        if where.device == "cuda":
            torch.cuda.empty_cache()


def _outcome(cell: Cell, where: Where) -> dict[str, Any]:
    try:
        return {"status": MEASURED, "figures": cell.measure(where, **cell.key)}
    except NotMeasuredError as error:
        return {"status": NOT_MEASURED, "why": str(error)}
    except ModuleNotFoundError as error:
        return {"status": NOT_MEASURED, "why": f"not installed: {error.name}"}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": OUT_OF_MEMORY, "why": _first_line(error)}
    except Exception as error:
        if any(words in str(error) for words in _LACK_OF_MEMORY):
            return {"status": OUT_OF_MEMORY, "why": _first_line(error)}
        return {
            "status": FAILED,
            "why": f"{type(error).__name__}: {_first_line(error)}",
            "traceback": traceback.format_exc(limit=-12),
        }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]

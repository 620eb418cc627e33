"""What a run has logged and saved in its output folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.records import FILE_NAME, Record, Records, RunFacts, finite, read_records

Entry = Mapping[str, float]
"""The finite numbers of a log entry, with its optimizer step as "step"."""


_OF_EVERY_ENTRY = frozenset(("step", "epoch", "num_input_tokens_seen"))

_CLOCK_SLACK = 2.0
"""By how many seconds a file system's clock may be behind this machine's."""

_MAX_STEP = 2**53
"""A log entry of a later step is none of Trainer's: no float holds it exactly."""


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: the last part of its folder's path, or more of it if other runs share that.
        facts: its models and options, if it kept any (`report_samples`).
        max_steps: how many optimizer steps it was to take; None if unknown.
        log: its log entries, by step.
        records: what it kept token by token, by step.
        notes: what a reader should know about gaps.
        saved_step: the optimizer step of its last checkpoint.
    """

    name: str
    facts: RunFacts | None
    max_steps: int | None
    log: tuple[Entry, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...]
    saved_step: int = 0

    @property
    def last_step(self) -> int:
        """The last step that was logged or saved."""
        return max(self.saved_step, *(int(entry["step"]) for entry in self.log))


def read_run(folder: str | Path) -> Run:
    """Return the run in an `output_dir`, which may have been killed, or may still be running.

    Its log is read from the last `trainer_state.json`, in the folder or in a checkpoint, and from `_report.jsonl`.

    Raises:
        GKDDataError: There is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GKDDataError(f"expected the output_dir of a run; there is no folder {folder}")
    notes: list[str] = []
    state_path, state = _last_state(folder, notes)
    path = folder / FILE_NAME
    held = read_records(path) if path.is_file() else Records(None, (), 0)
    if held.unreadable:
        lines, are = ("line", "is") if held.unreadable == 1 else ("lines", "are")
        notes.append(f"{held.unreadable} {lines} of {FILE_NAME} could not be read and {are} left out.")
    log: list[Entry] = list(_entries(state.get("log_history", [])))
    recorded = list(_entries({**record.metrics, "step": record.step} for record in held.records))
    if state_path is not None and path.is_file():
        state_time, started = state_path.stat().st_mtime, (held.facts and held.facts.started) or 0.0
        is_older = state_time < started - _CLOCK_SLACK
        if is_older or (_contradict(log, recorded) and path.stat().st_mtime >= state_time):
            notes.append(f"{_relative(state_path, folder)} is from an earlier run, and is left out.")
            log, state = [], {}
        elif _contradict(log, recorded):
            notes.append(f"{FILE_NAME} is from an earlier run, and is left out.")
            held, recorded = Records(None, (), 0), []
    log = _merged(log, recorded)
    if not log:
        raise GKDDataError(
            f"expected the output_dir of a run that has logged something: a folder with {TRAINER_STATE_NAME}, "
            f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME} or {FILE_NAME}; {folder} has no log entries"
            + "".join(f". {note}" for note in notes)
        )
    if not held.records:
        notes.append("This run kept no completions: report_samples=4, for example, keeps four per log entry.")
    steps = state.get("max_steps") or (held.facts.max_steps if held.facts else None)
    max_steps = steps if isinstance(steps, int) and steps > 0 else None
    saved = state.get("global_step")
    saved_step = saved if isinstance(saved, int) and 0 < saved < _MAX_STEP else 0
    run = Run(folder.resolve().name, held.facts, max_steps, tuple(log), held.records, tuple(notes), saved_step)
    # Trainer's summary of a run: one that stopped early has it before max_steps.
    has_ended = any("train_runtime" in entry and entry["step"] == run.last_step for entry in log)
    if max_steps is not None and run.last_step < max_steps and not has_ended:
        unfinished = f"The last known step is {run.last_step} of {max_steps}: the run is not finished."
        run = replace(run, notes=(unfinished, *notes))
    return run


def _last_state(folder: Path, notes: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """Return the trainer state that was written last and can be read, with its path; empty if there is none."""
    paths = [folder / TRAINER_STATE_NAME, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    found = [path for path in paths if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(state, dict) and isinstance(state.get("log_history"), list):
                return path, state
            raise ValueError("no log_history")
        except (OSError, ValueError) as error:  # cut off by a crash
            notes.append(f"{_relative(path, folder)} could not be read, and is left out ({error}).")
    return None, {}


def _entries(log: Iterable[Any]) -> Iterator[dict[str, float]]:
    for entry in log:
        if isinstance(entry, Mapping) and isinstance(entry.get("step"), int) and 0 <= entry["step"] < _MAX_STEP:
            yield {**finite(entry), "step": entry["step"]}


def _contradict(log: Sequence[Entry], recorded: Sequence[Entry]) -> bool:
    """Return whether a loss was recorded that the log should have, up to its last step, and does not."""
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    last = max(losses, default=-1)
    return any(
        entry["step"] <= last and losses.get(entry["step"]) != entry["loss"] for entry in recorded if "loss" in entry
    )


def _merged(log: Sequence[Entry], recorded: Sequence[Entry]) -> list[Entry]:
    """Return the log with the recorded entries that it lacks, such as an evaluation after training, by step."""
    known = {(entry["step"], name) for entry in log for name in entry.keys() - _OF_EVERY_ENTRY}
    lacking = [
        entry
        for entry in recorded
        if not any((entry["step"], name) in known for name in entry.keys() - _OF_EVERY_ENTRY)
    ]
    return sorted([*log, *lacking], key=lambda entry: entry["step"])


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))

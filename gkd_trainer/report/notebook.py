"""Our metrics in the table that Trainer shows in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Trainer's own entries, and times: they would widen the table and say little about the student.
_LEFT_OUT = frozenset(
    ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen", "tokens_per_second")
)


class NotebookMetrics(TrainerCallback):
    """Adds columns to the table of transformers' NotebookProgressCallback, which shows only losses.

    It must come after that callback, since it completes its line.

    Args:
        callbacks: The trainer's callbacks.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self._callbacks = callbacks

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Complete the line of a log entry. In a run that evaluates, only evaluations have lines."""
        if args.eval_strategy == "no" and "loss" in (logs or {}):
            self._complete_line(_columns(logs or {}))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the line of an evaluation with the last log entry of training."""
        entry = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        # A name of its own, since validation has the same metrics.
        self._complete_line({f"Training {name}": value for name, value in _columns(entry).items()})

    def _complete_line(self, columns: Mapping[str, float]) -> None:
        notebook: Any = sys.modules["transformers.utils.notebook"]
        for callback in self._callbacks:
            if isinstance(callback, notebook.NotebookProgressCallback) and callback.training_tracker is not None:
                names, *lines = callback.training_tracker.inner_table
                if lines:  # write_line completes a line that begins with the same value
                    callback.training_tracker.write_line({names[0]: lines[-1][0], **columns})


def is_in_notebook() -> bool:
    """Return whether Trainer shows its progress as a table in a notebook."""
    return "transformers.utils.notebook" in sys.modules


def _columns(entry: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by column name, spelt as Trainer spells its own."""
    return {
        name.replace("_", " ").title(): value
        for name, value in entry.items()
        if name not in _LEFT_OUT and not name.startswith("seconds_")
    }

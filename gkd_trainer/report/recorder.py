"""Keeps what a report needs while a run trains: completions token by token, and the divergence by position."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.report.positions import PositionSums
from gkd_trainer.report.records import FILE_NAME, MAX_TOKENS, Record, RecordFile, RunFacts, finite
from gkd_trainer.report.token_map import TokenMap, token_maps
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)

FACTS = (
    "lmbda",
    "lmbda_end",
    "lmbda_schedule",
    "lmbda_granularity",
    "beta",
    "divergence",
    "divergence_options",
    "divergence_scale",
    "loss_temperature",
    "ce_weight",
    "seq_kd",
    "temperature",
    "max_new_tokens",
    "max_length",
    "teacher_top_k",
    "learning_rate",
    "seed",
)
"""The options in the file: only these and the modes of the teachers, none of which can hold a secret or a path."""


class Recorder(TrainerCallback):
    """Writes `_report.jsonl` in `output_dir`: on the first rank, a line for each log entry.

    The samples of an entry are the first ones of the first optimizer step after the previous entry, so that they are
    known before it is known what will be logged. Only those wait for the device.

    Args:
        args: The options; `report_samples` is how many samples an entry keeps.
        names: The names of student and teacher.
        modes: How the vocabularies of teachers with another one are compared.
        tokenizer: The student's, or None.
        reduce: Sums a tensor over ranks.
        is_first: Whether this is the first rank.
    """

    def __init__(
        self,
        args: Any,
        names: tuple[str, str],
        modes: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        reduce: Callable[[Tensor], Tensor],
        *,
        is_first: bool,
    ) -> None:
        self._args, self._names, self._modes = args, names, list(modes)
        self._tokenizer, self._reduce = tokenizer, reduce
        self._file = RecordFile(Path(args.output_dir) / FILE_NAME) if is_first else None
        self._step = 0
        self._positions, self._samples = PositionSums(), list[TokenMap]()
        self._sampled_step: int | None = None
        self._is_training = False

    def observe(self, batch: TokenBatch, student: StudentSignal, teacher: Signal, result: TokenDivergence) -> None:
        """Take a micro-batch that is trained on, with both models' predictions and their comparison."""
        self._positions.add(batch, result.values_N)
        wanted = self._args.report_samples - len(self._samples)
        if self._file is None or wanted <= 0 or self._sampled_step not in (None, self._step):
            return
        self._sampled_step = self._step
        self._samples += token_maps(
            batch,
            student,
            teacher,
            result,
            # Some may have no tokens to train on.
            list(dict.fromkeys(batch.on_host.rows_N.tolist()))[:wanted],
            self._tokenizer,
            temperature=self._args.loss_temperature,
            max_tokens=MAX_TOKENS,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin the file, or continue that of the run that is resumed."""
        self._clear()
        options = {name: _plain(getattr(self._args, name)) for name in FACTS}
        options["vocabulary_modes"] = self._modes
        facts = RunFacts(*self._names, state.max_steps, options, time.time())
        self._is_training = True
        self._write(lambda file: file.start(facts, state.global_step))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note which step the next micro-batches belong to."""
        self._step = state.global_step + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an entry: a training entry with what was kept since the previous one, any other on its own.

        A process that only evaluates writes none: the file is that of the run that trained.
        """
        if not self._is_training:
            return
        metrics = finite(logs or {})
        record = Record(state.global_step, metrics)
        if "loss" in metrics and "learning_rate" in metrics:
            positions = self._positions.read(self._args.device, self._reduce)
            record = Record(state.global_step, metrics, self._sampled_step, tuple(self._samples), positions)
            self._clear()
        self._write(lambda file: file.append(record))

    def _clear(self) -> None:
        self._positions.clear()
        self._samples, self._sampled_step = [], None

    def _write(self, write: Callable[[RecordFile], None]) -> None:
        if self._file is None:
            return
        try:
            write(self._file)
        except OSError as error:
            # A report is not worth a run.
            logger.warning("%s is no longer written: %s", FILE_NAME, error)
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value

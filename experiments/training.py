"""Train one student in one way, and measure it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from experiments.arms import Arm
from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer

Measure = Callable[[PreTrainedModel], dict[str, Any]]
"""Measures a student."""


@dataclass(frozen=True)
class Setting:
    """What all arms of an experiment share.

    `options` are of TrainingArguments, `own_options` of GKDConfig alone. `measured_at` are the shares of the steps
    after which the student is measured. Before and after training it is anyway, and there by `measure_at_end` too.
    `at_start` keeps the measurements before training, by seed, for runs in the same process that share them.
    """

    student: Callable[[int], PreTrainedModel]
    teacher: PreTrainedModel
    pad_token_id: int
    rows: Mapping[str, Callable[[int], Sequence[Mapping[str, Any]]]]
    measure: Measure
    options: Mapping[str, Any]
    own_options: Mapping[str, Any] = field(default_factory=dict)
    measured_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    measure_at_end: Measure | None = None
    at_start: dict[int, dict[str, Any]] = field(default_factory=dict)

    def starting_from(self, student: Callable[[int], PreTrainedModel], options: Mapping[str, Any]) -> Setting:
        """Return the same setting with other students, by seed, and other options of TrainingArguments."""
        return replace(self, student=student, options=options)


class _Meter(TrainerCallback):
    """Measures after some steps, and counts the time of training without that of measuring.

    Processor time is that of this process: on a shared machine, the only time that can be compared. With one thread it
    is the wall-clock time of a machine that does nothing else.
    """

    def __init__(self, measure: Measure, steps: Sequence[int]) -> None:
        self.points: list[dict[str, Any]] = []
        self.tokens = 0
        self._measure, self._steps = measure, {*steps}
        self._spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resume()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step not in self._steps:
            return
        self.spend(time.perf_counter() - self._began, time.process_time() - self._cpu_began)
        self.add(model, state.global_step)
        self._resume()

    def add(self, student: PreTrainedModel, step: int, measured: Mapping[str, Any] | None = None) -> None:
        """Add a point: what is measured after a step, unless that is known."""
        if measured is None:
            is_training = student.training
            student.eval()
            measured = self._measure(student)
            student.train(is_training)
        self.points.append({"step": step, "tokens": self.tokens, **self._spent, **measured})

    def spend(self, seconds: float, cpu_seconds: float) -> None:
        """Add time to that of training."""
        self._spent["seconds"] += seconds
        self._spent["cpu_seconds"] += cpu_seconds

    def _resume(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()


class _Counting:
    """A trainer that tells its meter how many tokens it learns from."""

    meter: _Meter

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        assert num_items_in_batch is not None
        self.meter.tokens += int(num_items_in_batch)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return loss


class _CountingTrainer(_Counting, Trainer):
    pass


class _CountingGKDTrainer(_Counting, GKDTrainer):
    pass


def trained(
    setting: Setting, arm: Arm, seed: int, steps: int, *, measures: bool = True
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a student in one way, and return it with its measurements.

    `points` are the measurements, the first before training, with the steps, tokens and seconds up to them. The time in
    which a teacher samples its rows counts as training.
    """
    student = setting.student(seed)
    at_end = setting.measure_at_end or (lambda student: {})
    shares = (*setting.measured_at, 1.0) if measures else ()
    meter = _Meter(setting.measure, [max(1, round(share * steps)) for share in shares])
    if measures:
        if seed not in setting.at_start:
            setting.at_start[seed] = {**setting.measure(student.eval()), **at_end(student)}
        meter.add(student, 0, setting.at_start[seed])
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = Dataset.from_list([dict(row) for row in setting.rows[arm.data](seed)])
    if arm.data == "teacher":
        meter.spend(time.perf_counter() - began, time.process_time() - cpu_began)
        if measures:  # nothing was learnt meanwhile
            meter.add(student, 0, setting.at_start[seed])
    with TemporaryDirectory() as folder:
        trainer = _trainer(setting, arm, student, rows, seed, steps, Path(folder))
        trainer.meter = meter
        trainer.add_callback(meter)
        trainer.train()
    if measures:
        meter.points[-1] |= at_end(student.eval())
    return student, {"points": meter.points}


def _trainer(
    setting: Setting,
    arm: Arm,
    student: PreTrainedModel,
    rows: Dataset,
    seed: int,
    steps: int,
    folder: Path,
) -> _CountingTrainer | _CountingGKDTrainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **setting.options,
    }
    if arm.loss == "cross-entropy":
        return _CountingTrainer(
            student,
            TrainingArguments(**options),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=setting.pad_token_id),
        )
    return _CountingGKDTrainer(
        student,
        GKDConfig(**options, **{**setting.own_options, **arm.options}),
        train_dataset=rows,
        teacher=FrozenTeacher(setting.teacher),
    )

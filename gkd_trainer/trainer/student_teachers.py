"""Teachers that run the student: attached to it, updated after its steps, saved in its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.heads import InseparableHead, SeparableHead
from gkd_trainer.teachers import StudentTeacher, Teacher, all_teachers
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)


class StudentTeachers:
    """The teachers that run the student's own model, alone or inside of another teacher."""

    def __init__(self, teacher: Teacher) -> None:
        self._teachers: Sequence[StudentTeacher] = [
            each for each in all_teachers(teacher) if isinstance(each, StudentTeacher)
        ]

    def attach(self, student: nn.Module, ranks: Ranks, head: SeparableHead | InseparableHead | None = None) -> None:
        """Attach each to the student, Trainer's `model`, and to its head if that is known.

        Raises:
            GKDTeacherError: A teacher can't be made of this student, or FSDP version 1 shards it.
        """
        if self._teachers and ranks.sharding == "fsdp1":
            raise GKDTeacherError(
                "a teacher that runs the student switches its adapters between forwards, which FSDP version 1 does not "
                "support: set fsdp_config={'version': 2}"
            )
        for teacher in self._teachers:
            teacher.attach(student, head)

    def callback(self) -> TrainerCallback | None:
        """Return the callback that updates them after each optimizer step; None if there are none."""
        return _UpdateTeachers(self._teachers) if self._teachers else None

    def save(self, checkpoint: str | Path, *, is_writer: bool) -> None:
        """Save their states in a checkpoint; all ranks call this, and one of those that see its folder writes it."""
        for number, teacher in enumerate(self._teachers):
            state = teacher.state()
            if state and is_writer:
                file = _file(checkpoint, number)
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)

    def load(self, checkpoint: str | Path | None) -> None:
        """Go on from the states in a checkpoint, if there is one.

        Raises:
            GKDTeacherError: A state does not fit the student.
        """
        for teacher, state in self._saved_in(checkpoint):
            teacher.load_state({} if state is None else state)

    def load_best(self, checkpoint: str | Path | None) -> None:
        """Take the states in the checkpoint of the best student; where it has none, the last ones are kept.

        Raises:
            GKDTeacherError: A state does not fit the student.
        """
        for teacher, state in self._saved_in(checkpoint):
            if state is not None:
                teacher.load_state(state)
            elif teacher.state():
                logger.warning(
                    "%s has the best student, but not the average of its adapter at that step (as with "
                    "save_only_model): the teacher stays the average at the last step.",
                    checkpoint,
                )

    def _saved_in(self, checkpoint: str | Path | None) -> Iterator[tuple[StudentTeacher, dict[str, Tensor] | None]]:
        """Yield each teacher with its state in a checkpoint, None if that has none; nothing without a checkpoint."""
        if checkpoint is None:
            return
        for number, teacher in enumerate(self._teachers):
            file = _file(checkpoint, number)
            yield teacher, load_file(file) if file.exists() else None


class _UpdateTeachers(TrainerCallback):
    def __init__(self, teachers: Sequence[StudentTeacher]) -> None:
        self._teachers = teachers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Under fp16 a step whose gradients overflow changes nothing.
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            for teacher in self._teachers:
                teacher.update()


def _file(checkpoint: str | Path, number: int) -> Path:
    return Path(checkpoint) / f"teacher-{number}.safetensors"

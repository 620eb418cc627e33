"""The part of the trainer that loses nothing when rollouts, a sync or a teacher fail: ranks stop together, saved."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.trainer import TRAINER_STATE_NAME

from gkd_trainer.errors import (
    GKDConfigError,
    GKDDataError,
    GKDError,
    GKDRolloutError,
    GKDServerError,
    GKDTeacherError,
)
from gkd_trainer.trainer.any_trainer import AnyTrainer
from gkd_trainer.trainer.checkpoints import last_whole_checkpoint, required_whole

_KINDS: tuple[type[GKDError], ...] = (
    GKDError,
    GKDDataError,
    GKDConfigError,
    GKDRolloutError,
    GKDTeacherError,
    GKDServerError,
)
"""What a rank raises where another failed; of several, the last that any of them had."""


class RecoveryMixin(AnyTrainer):
    """Turns whatever fails in rollouts, a sync or a teacher into a checkpoint and one error on every rank."""

    _common_failure: GKDError | None = None
    _random_states: tuple[Any, ...] | None = None
    _last_checkpoint: Path | None = None

    @property
    def last_checkpoint(self) -> Path | None:
        """The folder of the last checkpoint that this run saved or resumed from."""
        return self._last_checkpoint

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises GKDConfigError where there is none, or where the one that was named is not whole.
        """
        checkpoint: str | None = None
        if resume_from_checkpoint is True:
            checkpoint = str(last_whole_checkpoint(self.args.output_dir))
        elif resume_from_checkpoint:
            checkpoint = str(required_whole(resume_from_checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _note_random_states(self) -> None:
        """Remember the random states of a step's end: a run that resumes there has to find them."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._random_states = random.getstate(), np.random.get_state(), torch.get_rng_state(), devices

    @contextmanager
    def _saving_before_it_fails(self) -> Iterator[None]:
        """Save a checkpoint of the last complete step where what all ranks raise together ends it, and name it."""
        try:
            yield
        except GKDError as error:
            is_common, self._common_failure = error is self._common_failure, None
            # Saving takes all ranks: what one rank raises by itself is passed on as it is.
            if not is_common or not self.is_in_train or self.state.global_step == 0:
                raise
            kind = next(kind for kind in reversed(_KINDS) if isinstance(error, kind))
            raise kind(f"{error}. {self._saved(error)}") from error

    def _saved(self, error: GKDError) -> str:
        """Save a checkpoint of the last complete step, unless there is one, and say where it is."""
        step = self.state.global_step
        if self._last_checkpoint is None or self._last_checkpoint.name != f"checkpoint-{step}":
            if self._random_states is not None:
                python, numpy, cpu, devices = self._random_states
                random.setstate(python)
                np.random.set_state(numpy)
                torch.set_rng_state(cpu)
                torch.cuda.set_rng_state_all(devices)
            before = self._last_checkpoint
            try:
                self._save_checkpoint(self.model, getattr(self, "_trial", None))
            except Exception as failure:  # a full disk must not hide what ended the run
                return (
                    f"The run up to step {step} could not be saved ({type(failure).__name__}: {failure}); the last "
                    f"checkpoint is {before or 'none'}"
                )
        what = "weights, without what save_only_model leaves out," if self.args.save_only_model else "run"
        when = "once the server is back" if isinstance(error, GKDServerError) else "once that is fixed"
        return (
            f"The {what} up to step {step} is saved in {self._last_checkpoint}: {when}, go on with "
            "train(resume_from_checkpoint=True)"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Of an older run in the same folder: it would make a half-written checkpoint seem whole.
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self._last_checkpoint = checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first rank writes Trainer's state next, and it stands for all ranks

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._last_checkpoint = None if checkpoint is None else Path(checkpoint)

    @contextmanager
    def _failing_together(self, kind: type[GKDError], what: str, *, exchanges: bool = True) -> Iterator[None]:
        """Raise what fails in the block on every rank, as a GKDError.

        Args:
            kind: The error that stands in for one that is not a GKDError.
            what: The part of the run that failed, as that error begins.
            exchanges: Whether the ranks tell one another of failures, for which all have to enter the block.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as failure:
            failed = failure
        self._raise_together(failed, kind, what, exchanges=exchanges)

    def _raise_together(
        self, failure: BaseException | None, kind: type[GKDError], what: str, *, exchanges: bool = True
    ) -> None:
        """Raise what failed on this rank, and on all others too: they would wait for it in their next exchange."""
        is_alone = self.accelerator.num_processes == 1
        if self.args.auto_find_batch_size:  # with which Trainer starts again on every rank
            is_out_of_memory = failure is not None and should_reduce_batch_size(failure)
            if self._is_anywhere(is_out_of_memory) if exchanges else is_out_of_memory:
                raise failure if is_out_of_memory and failure else RuntimeError("Another rank ran out of memory.")
        error = self._typed(failure, kind, what)
        if exchanges and not is_alone:
            code = 0 if error is None else 1 + max(i for i, each in enumerate(_KINDS) if isinstance(error, each))
            worst = int(self.accelerator.gather(torch.tensor([code], device=self.args.device)).max())
            if error is None and worst > 0:
                error = _KINDS[worst - 1]("stopped, since another rank failed, whose error says more")
        if error is not None:
            self._common_failure = error if exchanges or is_alone else None
            raise error

    @staticmethod
    def _typed(failure: BaseException | None, kind: type[GKDError], what: str) -> GKDError | None:
        if failure is None or isinstance(failure, GKDError):
            return failure
        error = kind(f"{what} failed with {type(failure).__name__}: {failure}")
        # contextlib drops a RuntimeError whose cause is a StopIteration, and raises that instead.
        error.__cause__ = None if isinstance(failure, StopIteration) else failure
        return error

    def _is_anywhere(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self._count_ranks(flag) > 0

    def _count_ranks(self, flag: bool) -> int:
        """Return on how many ranks the flag is set."""
        if self.accelerator.num_processes == 1:
            return int(flag)
        return int(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum"))

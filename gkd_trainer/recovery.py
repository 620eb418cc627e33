"""The part of the trainer that loses nothing when a server or teacher fails: ranks stop together, after saving."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkd_trainer.any_trainer import AnyTrainer
from gkd_trainer.errors import GKDError, GKDServerError, GKDTeacherError


class RecoveryMixin(AnyTrainer):
    """Turns the failure of a server or a teacher into a checkpoint and one error on every rank."""

    _random_states: tuple[Any, ...] | None = None
    _last_checkpoint: Path | None = None

    @property
    def last_checkpoint(self) -> Path | None:
        """The folder of the last checkpoint that this run saved or resumed from."""
        return self._last_checkpoint

    def _note_random_states(self) -> None:
        """Remember the random states of a step's end: a run that resumes there has to find them."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._random_states = random.getstate(), np.random.get_state(), torch.get_rng_state(), devices

    @contextmanager
    def _saving_before_it_fails(self) -> Iterator[None]:
        """Save a checkpoint of the last complete step where a server or a teacher fails, and say so in the error."""
        try:
            yield
        except (GKDServerError, GKDTeacherError) as error:
            step = self.state.global_step
            if not self.is_in_train or step == 0:
                raise
            if self._last_checkpoint is None or self._last_checkpoint.name != f"checkpoint-{step}":
                if self._random_states is not None:
                    python, numpy, cpu, devices = self._random_states
                    random.setstate(python)
                    np.random.set_state(numpy)
                    torch.set_rng_state(cpu)
                    torch.cuda.set_rng_state_all(devices)
                self._save_checkpoint(self.model, getattr(self, "_trial", None))
            what = "weights, without what save_only_model leaves out," if self.args.save_only_model else "run"
            is_server = isinstance(error, GKDServerError)
            kind = GKDServerError if is_server else GKDTeacherError
            when = "once the server is back" if is_server else "once that is mended"
            raise kind(
                f"{error}. The {what} up to step {step} is saved in {self._last_checkpoint}: {when}, go on with "
                "train(resume_from_checkpoint=True)"
            ) from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._last_checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._last_checkpoint = None if checkpoint is None else Path(checkpoint)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except GKDError as failure:
            error = failure
        self._raise_together(error)

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise what failed on this rank, and on all others too: they would wait for it in their next exchange."""
        if self.accelerator.num_processes > 1:
            is_server = isinstance(error, GKDServerError)
            flags = torch.tensor([is_server, error is not None and not is_server], device=self.args.device).long()
            of_servers, others = self.accelerator.reduce(flags, "sum").tolist()
            if error is None and of_servers + others > 0:
                kind = GKDServerError if of_servers else GKDError
                raise kind("stopped, since another rank failed, whose error says more")
        if error is not None:
            raise error

    def _is_anywhere(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum") > 0)

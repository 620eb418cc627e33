"""The part of the trainer that loses nothing when a server fails: ranks stop together, and the last step is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gkd_trainer.any_trainer import AnyTrainer
from gkd_trainer.errors import GKDServerError


class RecoveryMixin(AnyTrainer):
    """Turns the failure of a server into a checkpoint and one error on every rank."""

    _window_rng: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def _note_window_rng(self) -> None:
        """Remember the random states before a window: a run that resumes there has to find them."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._window_rng = torch.get_rng_state(), devices

    @contextmanager
    def _saving_before_it_fails(self) -> Iterator[None]:
        """Save a checkpoint of the last complete step where a server fails for good, and say so in the error."""
        try:
            yield
        except GKDServerError as error:
            step = self.state.global_step
            if not self.is_in_train or step == 0:
                raise
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
            if not (checkpoint / "trainer_state.json").exists():
                if self._window_rng is not None:
                    torch.set_rng_state(self._window_rng[0])
                    torch.cuda.set_rng_state_all(self._window_rng[1])
                self._save_checkpoint(self.model, trial=None)
            raise GKDServerError(
                f"{error}. The {step} steps before are saved in {checkpoint}: once the server is back, go on with "
                "train(resume_from_checkpoint=True)"
            ) from error

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except GKDServerError as failure:
            error = failure
        self._raise_together(error)

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise what failed on this rank, and on all others too: they would wait for it in their next exchange."""
        if error is not None and not isinstance(error, GKDServerError):
            raise error
        if self._is_anywhere(error is not None):
            raise error or GKDServerError("stopped, since a server failed another rank, whose log says more")

    def _is_anywhere(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum") > 0)

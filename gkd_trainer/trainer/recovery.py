"""If a part of a step fails or gives non-finite values, the ranks save a checkpoint and stop together."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from gkd_trainer.errors import (
    GKDConfigError,
    GKDDataError,
    GKDError,
    GKDNumericsError,
    GKDRolloutError,
    GKDServerError,
    GKDTeacherError,
)
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)

_KINDS: tuple[type[GKDError], ...] = (
    GKDError,
    GKDNumericsError,
    GKDDataError,
    GKDConfigError,
    GKDRolloutError,
    GKDTeacherError,
    GKDServerError,
)
"""What a rank raises if another failed; if several failed, the last of their kinds in this order."""


class Recovery:
    """Turns a failure of a step into a checkpoint and one error on every rank.

    Args:
        ranks: The ranks that fail together.
        restarts_without_memory: Whether Trainer restarts if memory runs out (`auto_find_batch_size`): such an error is
            passed on unchanged.
        saves_only_model: Whether checkpoints hold only weights (`save_only_model`), which the error mentions.

    Attributes:
        last_checkpoint: The folder of the last checkpoint that this run saved or resumed from.
    """

    def __init__(self, ranks: Ranks, *, restarts_without_memory: bool = False, saves_only_model: bool = False) -> None:
        self.last_checkpoint: Path | None = None
        self._ranks = ranks
        self._restarts_without_memory = restarts_without_memory
        self._saved_part = "weights, without what save_only_model leaves out," if saves_only_model else "run"
        self._common_failure: GKDError | None = None
        self._random_states: _RandomStates | None = None

    def note_random_states(self) -> None:
        """Remember the random states at the end of a step, for a checkpoint of that step."""
        self._random_states = _RandomStates.current()

    @contextmanager
    def saving_before_it_fails(self, step: int | None, save: Callable[[], None]) -> Iterator[None]:
        """If all ranks raise together in the block, save a checkpoint of the last complete step, and name it.

        Args:
            step: That step; None or 0 if there is nothing to save.
            save: Saves the checkpoint of that step, on all ranks, and sets `last_checkpoint`.
        """
        try:
            yield
        except GKDError as error:
            is_common, self._common_failure = error is self._common_failure, None
            # Saving takes all ranks: an error on only one is passed on unchanged.
            if not is_common or not step:
                raise
            kind = next(kind for kind in reversed(_KINDS) if isinstance(error, kind))
            when = "once the server is back" if isinstance(error, GKDServerError) else "once it is fixed"
            raise kind(f"{error}. {self._saved(step, save, when)}") from error

    @contextmanager
    def failing_together(self, kind: type[GKDError], what: str, *, exchanges: bool = True) -> Iterator[None]:
        """Raise a failure in the block on every rank, as a GKDError.

        Args:
            kind: The type for a failure that is not a GKDError.
            what: The part of the run that failed, for the start of its message.
            exchanges: Whether the ranks tell each other of failures; then all must enter the block.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as failure:
            failed = failure
        self.raise_together(failed, kind, what, exchanges=exchanges)

    def raise_together(
        self, failure: BaseException | None, kind: type[GKDError], what: str, *, exchanges: bool = True
    ) -> None:
        """Raise a failure of one rank on all ranks: otherwise the others would wait for it in their next exchange.

        The arguments are those of `failing_together`; `failure` is None if nothing failed on this rank.
        """
        if self._restarts_without_memory:
            is_out_of_memory = failure is not None and should_reduce_batch_size(failure)
            if self._ranks.any(is_out_of_memory) if exchanges else is_out_of_memory:
                raise failure if is_out_of_memory and failure else RuntimeError("Another rank ran out of memory.")
        error = _typed(failure, kind, what)
        if exchanges:
            if error is not None and self._ranks.size > 1:
                # Now: if other ranks wait for this one inside of the block, the exchange ends only by its time-out.
                logger.error("Rank %d: %s", self._ranks.index, error)
            code = 0 if error is None else 1 + max(i for i, each in enumerate(_KINDS) if isinstance(error, each))
            worst = self._ranks.largest(code)
            if error is None and worst > 0:
                error = _KINDS[worst - 1]("stopped, since another rank failed: see its error")
        if error is not None:
            self._common_failure = error if exchanges or self._ranks.size == 1 else None
            raise error

    def raise_known(self, failure: GKDError) -> NoReturn:
        """Raise a failure of this rank, of which all ranks know, and which they raise too."""
        self._common_failure = failure
        raise failure

    def _saved(self, step: int, save: Callable[[], None], when: str) -> str:
        """Save a checkpoint of the last complete step, unless there is one; return where it is."""
        if self.last_checkpoint is None or self.last_checkpoint.name != f"checkpoint-{step}":
            if self._random_states is not None:
                self._random_states.restore()
            before = self.last_checkpoint
            try:
                save()
            except Exception as failure:  # a full disk must not hide the original error
                return (
                    f"The run up to step {step} could not be saved ({type(failure).__name__}: {failure}); the last "
                    f"checkpoint is {before or 'none'}"
                )
        return (
            f"The {self._saved_part} up to step {step} is saved in {self.last_checkpoint}: {when}, resume with "
            "train(resume_from_checkpoint=True)"
        )


def warn_of_short_exchanges(args: Any) -> None:
    """Warn if other ranks stop waiting for a rank before its call to a server may fail: no checkpoint would be saved.

    Args:
        args: TrainingArguments with GKDArguments.
    """
    has_servers = args.uses_vllm_server or args.teacher_server_base_url is not None
    longest_call = args.vllm_server_timeout + args.vllm_request_timeout
    if has_servers and args.world_size > 1 and longest_call >= args.ddp_timeout:
        logger.warning(
            "A call to a server may take vllm_server_timeout + vllm_request_timeout = %g s before it fails, but the "
            "other ranks wait for this one only for ddp_timeout=%g s: the run would then end without a checkpoint. "
            "Raise ddp_timeout.",
            longest_call,
            args.ddp_timeout,
        )


class _RandomStates(NamedTuple):
    python: tuple[object, ...]
    numpy: Any
    cpu: Tensor
    devices: list[Tensor]

    @classmethod
    def current(cls) -> _RandomStates:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), devices)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.devices)


def _typed(failure: BaseException | None, kind: type[GKDError], what: str) -> GKDError | None:
    if failure is None or isinstance(failure, GKDError):
        return failure
    error = kind(f"{what} failed with {type(failure).__name__}: {failure}")
    # contextlib drops a RuntimeError whose cause is a StopIteration, and raises that instead.
    error.__cause__ = None if isinstance(failure, StopIteration) else failure
    return error

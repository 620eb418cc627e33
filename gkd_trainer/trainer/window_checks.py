"""What is checked of a window before the optimizer steps: finite values, and that rollouts are the student's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.errors import GKDNumericsError, GKDRolloutError
from gkd_trainer.trainer.finite import FiniteCheck, has_finite_weights
from gkd_trainer.trainer.ranks import Ranks
from gkd_trainer.trainer.recovery import Recovery
from gkd_trainer.trainer.sampling_check import SamplingCheck, is_noisy
from gkd_trainer.types import TokenBatch


class WindowChecks:
    """Both checks, read from the device together.

    Args:
        ranks: The ranks that train together.
        recovery: Makes them save a checkpoint and fail together.
        drop_rollouts: Forgets completions that are not trained on yet, so that no checkpoint holds them.
    """

    def __init__(self, ranks: Ranks, recovery: Recovery, drop_rollouts: Callable[[], None]) -> None:
        self._ranks, self._recovery, self._drop_rollouts = ranks, recovery, drop_rollouts
        self.sampling = SamplingCheck()
        self.finite = FiniteCheck(beside=self.sampling.taken)
        self._has_current_rollouts = False

    def begin(self, *, has_current_rollouts: bool) -> None:
        """Begin a window; say whether the current weights generated its completions, if it has any."""
        self.finite.clear()
        self._has_current_rollouts = has_current_rollouts

    def add(self, batch: TokenBatch, result: TokenDivergence, sums_BK: Tensor) -> None:
        """Add a micro-batch: what the loss found, and its `sums_by_sample`."""
        if self._has_current_rollouts:
            self.sampling.add(sums_BK)
        is_finite_N = result.is_finite_N
        if result.loss_N is not None and result.cross_entropy_N is not None:
            is_finite_N = is_finite_N & result.cross_entropy_N.isfinite()
        self.finite.add(batch.rows_N, batch.labels_BL.shape[0], result.is_teacher_finite_N, is_finite_N)

    def begin_reading(self) -> None:
        """Begin to read the window's flags and sums; on all ranks together. See `FiniteCheck`."""
        self.finite.begin_reading(self._ranks.sum)

    def require_sound(self, step: int, model: nn.Module, args: Any) -> None:
        """Raise if the window must not be learned from; on all ranks together.

        Args:
            step: The next optimizer step, from 1, for messages.
            model: The student.
            args: The options.

        Raises:
            GKDNumericsError: Values are not finite. The last complete step is saved, unless its weights are not finite.
            GKDRolloutError: See `SamplingCheck`. The last complete step is saved, without that engine's completions.
        """
        try:
            sums = self.finite.raise_if_not(step, self._ranks.index, self._ranks.sum)
        except GKDNumericsError as error:
            if self._ranks.any(not has_finite_weights(model)):
                raise GKDNumericsError(
                    f"{error}. The student's weights are not finite since an earlier step, so they are not saved"
                ) from error
            self._recovery.raise_known(error)
        try:
            self.sampling.judge(sums, step, is_noisy=lambda: is_noisy(model, args))
        except GKDRolloutError as error:
            self._drop_rollouts()
            self._recovery.raise_known(error)

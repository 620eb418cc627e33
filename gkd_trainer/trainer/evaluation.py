"""The metrics of an evaluation: each token has the same weight, whatever its batch or rank.

Shapes: B batch, K summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from transformers.trainer_utils import has_length

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.metrics import ONE_TEACHER, EvaluationMeter, TeacherSums
from gkd_trainer.trainer.ranks import Ranks


class Evaluation:
    """The sums of one evaluation: over the data, and over the student's own completions.

    Args:
        gather: Collects samples over ranks, or their sums, without those that only pad the last batch.
        teachers: The sums for each of several teachers.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], teachers: TeacherSums = ONE_TEACHER) -> None:
        self._gather = gather
        self._data, self._on_policy = EvaluationMeter(teachers), EvaluationMeter(teachers)
        self._sums_BK: Tensor | None = None

    def see(self, sums_BK: Tensor) -> None:
        """Take the `sums_by_sample` of the batch whose loss is being computed."""
        self._sums_BK = sums_BK

    def count(self, loss: Tensor, *, is_on_policy: bool = False) -> None:
        """Add the batch last seen, with its loss.

        If none was seen, nothing is added: a subclass may compute its own loss, for which Trainer's mean is kept.
        """
        sums_BK, self._sums_BK = self._sums_BK, None
        if sums_BK is not None:
            (self._on_policy if is_on_policy else self._data).add(sums_BK, loss, self._gather)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return all metrics under their names in the log, such as eval_loss and eval_on_policy_loss."""
        on_policy = {f"on_policy_{name}": metric for name, metric in self._on_policy.read().items()}
        return {f"{prefix}_{name}": metric for name, metric in {**self._data.read(), **on_policy}.items()}


def require_equal_batches(loader: Any, ranks: Ranks, *, gathers_outputs: bool) -> None:
    """Raise GKDConfigError, on all ranks, if they have different numbers of batches, and would wait for one another.

    If `gathers_outputs`, the same holds for batches of different sizes. Either may happen without `even_batches`.
    Loaders without a length, and sizes in a user's own loader, can't be checked.
    """
    if ranks.size == 1 or ranks.accelerator.even_batches or not has_length(loader):
        return
    counts = ranks.gather(torch.tensor([len(loader)], device=ranks.accelerator.device)).tolist()
    if min(counts) != max(counts):
        raise GKDConfigError(
            f"each rank must evaluate the same number of batches, but they have {', '.join(map(str, counts))}, and "
            "would wait for one another forever: set even_batches to True in accelerator_config, or lower "
            "per_device_eval_batch_size"
        )
    if gathers_outputs and (sizes := _uneven_sizes(loader)) is not None:
        raise GKDConfigError(
            "compute_metrics and predict gather the outputs of all ranks, so their batches must have the same size, "
            f"but {sizes[0]} samples are not a multiple of the {sizes[1]} in one batch of every rank: set even_batches "
            "to True in accelerator_config, choose another per_device_eval_batch_size, or evaluate without "
            "compute_metrics"
        )


def _uneven_sizes(loader: Any) -> tuple[int, int] | None:
    """Return how many samples there are, and in one batch of every rank, if the ranks' last batches differ in size.

    Returns None if they don't, or if not Accelerate deals them out.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, BatchSamplerShard) or sampler.batch_size is None or sampler.drop_last:
        return None
    sizes = int(loader.total_dataset_length), int(loader.total_batch_size)
    return sizes if sizes[0] % sizes[1] else None

"""The metrics of a run: sums kept on the device while it trains, and read when they are logged.

Shapes: B batch, N tokens trained on, K summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter

import torch
from torch import Tensor

TOKEN_SUMS = (
    "tokens",
    "divergence",
    "on_policy_tokens",
    "on_policy_divergence",
    "student_entropy",
    "teacher_entropy",
    "agreements",
    "top_k_tokens",
    "teacher_top_k_mass",
    "student_top_k_mass",
)
"""What is summed over the tokens trained on, in the order of the columns of `sums_by_row`."""

SAMPLE_SUMS = (
    "samples",
    "on_policy_samples",
    "samples_without_prompt",
    "completions",
    "completion_tokens",
    "truncated_completions",
    "stale_steps",
)
"""What is counted over samples and completions."""


def sums_by_row(
    rows_N: Tensor,
    is_on_policy_B: Tensor,
    *,
    divergence_N: Tensor,
    student_entropy_N: Tensor,
    teacher_entropy_N: Tensor,
    agrees_N: Tensor,
    teacher_mass_N: Tensor | None = None,
    student_mass_N: Tensor | None = None,
) -> Tensor:
    """Return the TOKEN_SUMS of each sample of a batch, [B, K], without gradients and without reading the device.

    Args:
        rows_N: The sample that each token belongs to.
        is_on_policy_B: Which samples the student generated.
        divergence_N: The divergence of each token, in nats.
        student_entropy_N: The entropy of the student's distribution at each token, in nats.
        teacher_entropy_N: The teacher's.
        agrees_N: Whether both have the same most probable token.
        teacher_mass_N: The teacher's probability of its top k at each token; None where it gives all.
        student_mass_N: The student's probability of them.
    """
    dtype = _sum_dtype(rows_N.device)
    on_policy_N = is_on_policy_B[rows_N].to(dtype)
    divergence_N = divergence_N.detach().to(dtype)
    ones_N, zeros_N = torch.ones_like(divergence_N), torch.zeros_like(divergence_N)
    columns_NK = torch.stack(
        [
            ones_N,
            divergence_N,
            on_policy_N,
            divergence_N * on_policy_N,
            student_entropy_N.to(dtype),
            teacher_entropy_N.to(dtype),
            agrees_N.to(dtype),
            zeros_N if teacher_mass_N is None else ones_N,
            zeros_N if teacher_mass_N is None else teacher_mass_N.to(dtype),
            zeros_N if student_mass_N is None else student_mass_N.to(dtype),
        ],
        dim=1,
    )
    sums_BK = torch.zeros(is_on_policy_B.shape[0], len(TOKEN_SUMS), dtype=dtype, device=rows_N.device)
    return sums_BK.index_add_(0, rows_N, columns_NK)


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the means that TOKEN_SUMS stand for; those over no token at all are left out."""
    off_policy_tokens = sums["tokens"] - sums["on_policy_tokens"]
    off_policy_divergence = sums["divergence"] - sums["on_policy_divergence"]
    return _ratios(
        divergence_on_policy=(sums["on_policy_divergence"], sums["on_policy_tokens"]),
        divergence_off_policy=(off_policy_divergence, off_policy_tokens),
        student_entropy=(sums["student_entropy"], sums["tokens"]),
        teacher_entropy=(sums["teacher_entropy"], sums["tokens"]),
        top_token_agreement=(sums["agreements"], sums["tokens"]),
        teacher_top_k_mass=(sums["teacher_top_k_mass"], sums["top_k_tokens"]),
        student_top_k_mass=(sums["student_top_k_mass"], sums["top_k_tokens"]),
    )


def sample_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return what SAMPLE_SUMS stand for; `samples_without_prompt` and `rollout_staleness` only where there are any."""
    metrics = _ratios(
        on_policy_share=(sums["on_policy_samples"], sums["samples"]),
        completion_length=(sums["completion_tokens"], sums["completions"]),
        truncated_share=(sums["truncated_completions"], sums["completions"]),
    )
    if sums["stale_steps"] > 0:
        metrics["rollout_staleness"] = sums["stale_steps"] / sums["on_policy_samples"]
    if sums["samples_without_prompt"] > 0:
        metrics["samples_without_prompt"] = sums["samples_without_prompt"]
    return metrics


class TrainingMeter:
    """What a rank sees between two log entries. Values of the device stay there until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._stopwatch = Stopwatch(device)
        self._token_sums_K: Tensor | None = None
        self._sample_sums = dict.fromkeys(SAMPLE_SUMS, 0.0)
        self._router_loss_sum: Tensor | None = None
        self._router_losses = 0
        self._device = device

    def measure(self, name: str) -> AbstractContextManager[None]:
        """Add the block's time to the seconds of "rollout" (which holds "sync") or "step" (which holds "teacher")."""
        return self._stopwatch.measure(name)

    def add_tokens(self, sums_BK: Tensor) -> None:
        """Add what `sums_by_row` gave for a micro-batch."""
        sums_K = sums_BK.sum(dim=0)
        self._token_sums_K = sums_K if self._token_sums_K is None else self._token_sums_K + sums_K

    def add_router_loss(self, loss: Tensor) -> None:
        """Add the load-balancing loss of a micro-batch."""
        loss = loss.detach().to(self._device, _sum_dtype(self._device))
        self._router_loss_sum = loss if self._router_loss_sum is None else self._router_loss_sum + loss
        self._router_losses += 1

    def add_samples(self, **counts: float) -> None:
        """Add to SAMPLE_SUMS by name."""
        for name, count in counts.items():
            self._sample_sums[name] += count

    def clear(self) -> None:
        """Forget what was added and measured."""
        self._stopwatch.read()
        self._token_sums_K, self._sample_sums = None, dict.fromkeys(SAMPLE_SUMS, 0.0)
        self._router_loss_sum, self._router_losses = None, 0

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the metrics since the last call; `reduce` adds a tensor up over ranks. The seconds are this rank's."""
        token_sums_K = self._token_sums_K
        if token_sums_K is None:
            token_sums_K = torch.zeros(len(TOKEN_SUMS), dtype=_sum_dtype(self._device), device=self._device)
        sample_sums_K = torch.tensor(list(self._sample_sums.values()), dtype=token_sums_K.dtype, device=self._device)
        router_2 = token_sums_K.new_tensor([0.0, self._router_losses])
        if self._router_loss_sum is not None:
            router_2[0] = self._router_loss_sum
        *totals, router_loss, router_losses = reduce(torch.cat([token_sums_K, sample_sums_K, router_2])).tolist()
        sums = dict(zip(TOKEN_SUMS + SAMPLE_SUMS, totals, strict=True))
        seconds = self._stopwatch.read()
        rollout_seconds = {}
        if "rollout" in seconds:  # else these would be columns of zeros
            rollout_seconds = {"seconds_rollout": seconds["rollout"], "seconds_sync": seconds.get("sync", 0.0)}
        self.clear()
        return {
            **token_metrics(sums),
            **sample_metrics(sums),
            **_ratios(aux_loss=(router_loss, router_losses)),
            **rollout_seconds,
            "seconds_teacher": seconds.get("teacher", 0.0),
            "seconds_student": seconds.get("step", 0.0) - seconds.get("teacher", 0.0),
            **_ratios(tokens_per_second=(sums["tokens"], seconds.get("rollout", 0.0) + seconds.get("step", 0.0))),
        }


class EvaluationMeter:
    """The sums of an evaluation, each sample of the data set counted once."""

    def __init__(self) -> None:
        self._sums_K: Tensor | None = None

    def add(self, sums_BK: Tensor, loss: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add a batch.

        Args:
            sums_BK: What `sums_by_row` gave for it.
            loss: What `compute_loss` returned for it: the mean over its tokens, which a subclass may have changed.
            gather: Collects rows over ranks, without those that only fill up the last batch.
        """
        tokens_B, divergence_B = sums_BK[:, 0], sums_BK[:, 1]
        # Exactly the row's divergence, unless a subclass changed the loss: then the change enters by its tokens.
        change = loss.detach().mean() - divergence_B.sum() / tokens_B.sum().clamp_min(1)
        loss_B = divergence_B + change.to(sums_BK.dtype) * tokens_B
        sums_K = gather(torch.cat([loss_B[:, None], sums_BK], dim=1)).sum(dim=0)
        self._sums_K = sums_K if self._sums_K is None else self._sums_K + sums_K

    def read(self) -> dict[str, float]:
        """Return the metrics over all tokens, and start again; empty where there were no tokens."""
        if self._sums_K is None:
            return {}
        sums = dict(zip(("loss", *TOKEN_SUMS), self._sums_K.tolist(), strict=True))
        self._sums_K = None
        metrics = {**_ratios(loss=(sums["loss"], sums["tokens"])), **token_metrics(sums)}
        return {name: metric for name, metric in metrics.items() if not name.startswith("divergence_")}


class Stopwatch:
    """Seconds spent under a name, added up; on CUDA between events of the stream, without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `name`."""
        if self._is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = perf_counter()
            yield
            self._add(name, perf_counter() - began)

    def read(self) -> dict[str, float]:
        """Return the seconds by name since the last call."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _sum_dtype(device: torch.device) -> torch.dtype:
    # float32 stops counting at 2²⁴ tokens; MPS has nothing wider.
    return torch.float32 if device.type == "mps" else torch.float64


def _ratios(**ratios: tuple[float, float]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in ratios.items() if count > 0}

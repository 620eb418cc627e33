"""The metrics of a run: sums kept on the device during training, and read when they are logged.

Shapes: B samples of a batch, N tokens trained on, K summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from gkd_trainer.divergence import TokenDivergence


class _Tokens(NamedTuple):
    """Measurements of N tokens; `divergence_N`, `is_on_policy_N` (0 or 1) and `ones_N` have the sums' dtype.

    `sampling_difference_N` is between the student's log-probability of a token and the rollout engine's, NaN where that
    is unknown; None if it is for all.
    """

    result: TokenDivergence
    divergence_N: Tensor
    is_on_policy_N: Tensor
    ones_N: Tensor
    sampling_difference_N: Tensor | None = None


@dataclass(frozen=True)
class TokenSum:
    """A quantity that is summed over tokens, and the metric derived from it.

    Attributes:
        values: the quantity of each token, or None if it was not measured.
        metric: the name of its mean; None for a sum that other metrics need.
        over: the sum that counts the tokens of the mean.
        without: another sum, over a subset of these tokens that the mean leaves out.
        is_evaluated: whether an evaluation, which measures the two policies apart, has the metric too.
    """

    values: Callable[[_Tokens], Tensor | None]
    metric: str | None = None
    over: str = "tokens"
    without: str | None = None
    is_evaluated: bool = True


TOKEN_SUMS: dict[str, TokenSum] = {
    "tokens": TokenSum(lambda tokens: tokens.ones_N),
    "on_policy_tokens": TokenSum(lambda tokens: tokens.is_on_policy_N),
    "on_policy_divergence": TokenSum(
        lambda tokens: tokens.divergence_N * tokens.is_on_policy_N,
        metric="divergence_on_policy",
        over="on_policy_tokens",
        is_evaluated=False,
    ),
    "divergence": TokenSum(
        lambda tokens: tokens.divergence_N,
        metric="divergence_off_policy",
        without="on_policy_divergence",
        is_evaluated=False,
    ),
    "sampled_tokens": TokenSum(lambda tokens: _has_value(tokens.sampling_difference_N)),
    "sampling_difference": TokenSum(
        lambda tokens: _without_nan(tokens.sampling_difference_N),
        metric="sampling_logp_difference",
        over="sampled_tokens",
        is_evaluated=False,
    ),
    "student_entropy": TokenSum(lambda tokens: tokens.result.student_entropy_N, metric="student_entropy"),
    "teacher_entropy": TokenSum(lambda tokens: tokens.result.teacher_entropy_N, metric="teacher_entropy"),
    "agreements": TokenSum(lambda tokens: tokens.result.agrees_N, metric="top_token_agreement"),
    "drafted": TokenSum(lambda tokens: _has_value(tokens.result.acceptance_N)),
    "accepted": TokenSum(lambda tokens: _without_nan(tokens.result.acceptance_N), metric="acceptance", over="drafted"),
    "top_k_tokens": TokenSum(lambda tokens: _has_value(tokens.result.teacher_mass_N)),
    "teacher_top_k_mass": TokenSum(
        lambda tokens: _without_nan(tokens.result.teacher_mass_N), metric="teacher_top_k_mass", over="top_k_tokens"
    ),
    "student_top_k_mass": TokenSum(
        lambda tokens: _without_nan(tokens.result.student_mass_N), metric="student_top_k_mass", over="top_k_tokens"
    ),
    "mapped_tokens": TokenSum(
        lambda tokens: None if tokens.result.is_grouped_N is None else ~tokens.result.is_grouped_N.isnan()
    ),
    "teacher_matched_mass": TokenSum(
        lambda tokens: _without_nan(tokens.result.teacher_matched_mass_N),
        metric="teacher_matched_mass",
        over="mapped_tokens",
    ),
    "student_matched_mass": TokenSum(
        lambda tokens: _without_nan(tokens.result.student_matched_mass_N),
        metric="student_matched_mass",
        over="mapped_tokens",
    ),
    "next_byte_tokens": TokenSum(
        lambda tokens: _without_nan(tokens.result.is_grouped_N), metric="next_byte_share", over="mapped_tokens"
    ),
}
"""The sums over the tokens trained on, by name, in the order of the columns of `sums_by_sample`."""

SAMPLE_SUMS = (
    "samples",
    "on_policy_samples",
    "samples_without_prompt",
    "completions",
    "completion_tokens",
    "truncated_completions",
    "stale_steps",
    "incomparable_tokens",
)
"""The counts of samples and completions, and of tokens that can't be compared with a teacher of another vocabulary."""


@dataclass(frozen=True)
class TeacherSums:
    """The sums over tokens for each of several teachers: its divergence, and the tokens compared with it.

    `names` are the teachers', in their order. `is_routed` says that each sample has one of them, else all.
    """

    names: tuple[str, ...] = ()
    is_routed: bool = False

    def __len__(self) -> int:
        return 2 * len(self.names)

    def columns(self, tokens: _Tokens, index_N: Tensor | None) -> list[Tensor]:
        """Return the quantities of each token; `index_N` is the index of its teacher, if it has only one."""
        if not self.names:
            return []
        if self.is_routed:
            assert index_N is not None
            weights = [(index_N == index).to(tokens.ones_N.dtype) for index in range(len(self.names))]
            # Not multiplied: another teacher's infinite divergence would become NaN.
            return [
                *(torch.where(weight_N == 1, tokens.divergence_N, 0.0) for weight_N in weights),
                *weights,
            ]
        terms_NT = tokens.result.terms_NT
        if terms_NT is None:  # a sum of one
            terms_NT = tokens.divergence_N[:, None]
        return [*terms_NT.detach().to(tokens.ones_N.dtype).unbind(dim=1), *[tokens.ones_N] * len(self.names)]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean divergence from each teacher and, if each sample has one, its share of the tokens."""
        divergences, tokens = sums[: len(self.names)], sums[len(self.names) :]
        metrics = _ratios(
            **{f"divergence_teacher_{n}": (d, t) for n, d, t in zip(self.names, divergences, tokens, strict=True)}
        )
        if self.is_routed:
            metrics |= _ratios(
                **{f"teacher_share_{n}": (t, sum(tokens)) for n, t in zip(self.names, tokens, strict=True)}
            )
        return metrics


ONE_TEACHER = TeacherSums()

_COLUMN = {name: column for column, name in enumerate(TOKEN_SUMS)}


def sums_by_sample(
    rows_N: Tensor,
    is_on_policy_B: Tensor,
    result: TokenDivergence,
    teachers: TeacherSums = ONE_TEACHER,
    teacher_index_B: Tensor | None = None,
    sampling_log_probs_N: Tensor | None = None,
) -> Tensor:
    """Return the TOKEN_SUMS of each sample of a batch, then those of `teachers`, [B, K].

    Neither has gradients, and nothing waits for the device.

    Args:
        rows_N: The sample that each token belongs to.
        is_on_policy_B: Which samples the student generated.
        result: The comparison of the models at each token.
        teachers: The sums for each of several teachers.
        teacher_index_B: The index of each sample's teacher, if each has one of several.
        sampling_log_probs_N: The rollout engine's log-probability of each token, NaN if unknown; compared with the
            student's cross entropy, if `result` has it.
    """
    dtype = _sum_dtype(rows_N.device)
    divergence_N = result.values_N.detach().to(dtype)
    difference_N = None
    if sampling_log_probs_N is not None and result.cross_entropy_N is not None:
        difference_N = (sampling_log_probs_N + result.cross_entropy_N.detach()).abs()
    ones_N = torch.ones_like(divergence_N)
    tokens = _Tokens(result, divergence_N, is_on_policy_B[rows_N].to(dtype), ones_N, difference_N)
    zeros_N = torch.zeros_like(divergence_N)
    columns = [token_sum.values(tokens) for token_sum in TOKEN_SUMS.values()]
    columns += teachers.columns(tokens, None if teacher_index_B is None else teacher_index_B[rows_N])
    columns_NK = torch.stack([zeros_N if column_N is None else column_N.to(dtype) for column_N in columns], dim=1)
    sums_BK = torch.zeros(is_on_policy_B.shape[0], len(columns), dtype=dtype, device=rows_N.device)
    return sums_BK.index_add_(0, rows_N, columns_NK)


def sampling_sums(sums_BK: Tensor) -> Tensor:
    """Return the sum of the differences between student and rollout engine over all samples, and of the tokens [2]."""
    return torch.stack([sums_BK[:, _COLUMN[name]].sum() for name in ("sampling_difference", "sampled_tokens")])


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of TOKEN_SUMS; means over no tokens are left out."""
    means = {}
    for name, token_sum in TOKEN_SUMS.items():
        total, count = sums[name], sums[token_sum.over]
        if token_sum.without is not None:
            total -= sums[token_sum.without]
            count -= sums[TOKEN_SUMS[token_sum.without].over]
        if token_sum.metric is not None:
            means[token_sum.metric] = (total, count)
    return _ratios(**means)


def sample_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of SAMPLE_SUMS, leaving out some if nothing was lost.

    These are `samples_without_prompt` and `rollout_staleness` if zero, and `compared_share` if one; that also needs the
    sum of TOKEN_SUMS' "tokens".
    """
    metrics = _ratios(
        on_policy_share=(sums["on_policy_samples"], sums["samples"]),
        completion_length=(sums["completion_tokens"], sums["completions"]),
        truncated_share=(sums["truncated_completions"], sums["completions"]),
    )
    if sums["stale_steps"] > 0:
        metrics["rollout_staleness"] = sums["stale_steps"] / sums["on_policy_samples"]
    if sums["samples_without_prompt"] > 0:
        metrics["samples_without_prompt"] = sums["samples_without_prompt"]
    if sums["incomparable_tokens"] > 0:
        metrics["compared_share"] = sums["tokens"] / (sums["tokens"] + sums["incomparable_tokens"])
    return metrics


class TrainingMeter:
    """Collects one rank's metrics between two log entries. Values on the device stay there until `read`.

    Args:
        device: The device of the sums.
        teachers: The sums for each of several teachers, which `sums_by_sample` was given too.
    """

    def __init__(self, device: torch.device, teachers: TeacherSums = ONE_TEACHER) -> None:
        self._teachers = teachers
        self._stopwatch = Stopwatch(device)
        self._token_sums_K: Tensor | None = None
        self._sample_sums = dict.fromkeys(SAMPLE_SUMS, 0.0)
        self._router_loss_sum: Tensor | None = None
        self._router_losses = 0
        self._device = device

    def measure(self, name: str) -> AbstractContextManager[None]:
        """Add the time of the `with` body to "rollout" (which includes "sync") or "step" (which includes "teacher")."""
        return self._stopwatch.measure(name)

    def add_tokens(self, sums_BK: Tensor) -> None:
        """Add the `sums_by_sample` of a micro-batch."""
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
        """Return the metrics since the last call; `reduce` sums a tensor over ranks. Seconds are this rank's own."""
        token_sums_K = self._token_sums_K
        if token_sums_K is None:
            width = len(TOKEN_SUMS) + len(self._teachers)
            token_sums_K = torch.zeros(width, dtype=_sum_dtype(self._device), device=self._device)
        sample_sums_K = torch.tensor(list(self._sample_sums.values()), dtype=token_sums_K.dtype, device=self._device)
        router_2 = token_sums_K.new_tensor([0.0, self._router_losses])
        if self._router_loss_sum is not None:
            router_2[0] = self._router_loss_sum
        *totals, router_loss, router_losses = reduce(torch.cat([token_sums_K, sample_sums_K, router_2])).tolist()
        end = len(TOKEN_SUMS) + len(self._teachers)
        by_teacher = totals[len(TOKEN_SUMS) : end]
        sums = dict(zip((*TOKEN_SUMS, *SAMPLE_SUMS), totals[: len(TOKEN_SUMS)] + totals[end:], strict=True))
        seconds = self._stopwatch.read()
        rollout_seconds = {}
        if "rollout" in seconds:  # else these would be columns of zeros
            rollout_seconds = {"seconds_rollout": seconds["rollout"], "seconds_sync": seconds.get("sync", 0.0)}
        self.clear()
        return {
            **token_metrics(sums),
            **self._teachers.metrics(by_teacher),
            **sample_metrics(sums),
            **_ratios(aux_loss=(router_loss, router_losses)),
            **rollout_seconds,
            "seconds_teacher": seconds.get("teacher", 0.0),
            "seconds_student": seconds.get("step", 0.0) - seconds.get("teacher", 0.0),
            **_ratios(tokens_per_second=(sums["tokens"], seconds.get("rollout", 0.0) + seconds.get("step", 0.0))),
        }


class EvaluationMeter:
    """The sums of an evaluation, in which each sample of the dataset counts once; `teachers` as in TrainingMeter."""

    def __init__(self, teachers: TeacherSums = ONE_TEACHER) -> None:
        self._teachers = teachers
        self._sums_K: Tensor | None = None

    def add(self, sums_BK: Tensor, loss: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Add a batch.

        Args:
            sums_BK: Its `sums_by_sample`.
            loss: Its loss from `compute_loss`: the mean over its tokens, which a subclass may have changed.
            gather: Collects samples over ranks, without those that only pad the last batch.
        """
        tokens_B, divergence_B = (sums_BK[:, _COLUMN[name]] for name in ("tokens", "divergence"))
        # Exactly the sample's divergence, unless a subclass changed the loss: then each token takes the same change.
        change = loss.detach().mean() - divergence_B.sum() / tokens_B.sum().clamp_min(1)
        loss_B = divergence_B + change.to(sums_BK.dtype) * tokens_B
        sums_K = gather(torch.cat([loss_B[:, None], sums_BK], dim=1)).sum(dim=0)
        self._sums_K = sums_K if self._sums_K is None else self._sums_K + sums_K

    def read(self) -> dict[str, float]:
        """Return the metrics over all tokens, and start again; empty if there were no tokens."""
        if self._sums_K is None:
            return {}
        totals = self._sums_K.tolist()
        sums = dict(zip(("loss", *TOKEN_SUMS), totals[: len(TOKEN_SUMS) + 1], strict=True))
        by_teacher = self._teachers.metrics(totals[len(TOKEN_SUMS) + 1 :])
        self._sums_K = None
        left_out = {token_sum.metric for token_sum in TOKEN_SUMS.values() if not token_sum.is_evaluated}
        metrics = {name: metric for name, metric in token_metrics(sums).items() if name not in left_out}
        return {**_ratios(loss=(sums["loss"], sums["tokens"])), **metrics, **by_teacher}


_MOST_EVENTS = 1000
"""How many pairs of events a stopwatch keeps before it adds up those of work that is done."""


class Stopwatch:
    """Sums of seconds by name; on CUDA measured between events of the stream, without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` body to `name`."""
        if self._is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            if len(self._events) > _MOST_EVENTS and self._events[_MOST_EVENTS // 2][2].query():
                self._fold(_MOST_EVENTS // 2)
        else:
            began = perf_counter()
            yield
            self._add(name, perf_counter() - began)

    def read(self) -> dict[str, float]:
        """Return the seconds by name since the last call."""
        self._fold(len(self._events))
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _fold(self, count: int) -> None:
        """Add up the first events, which must be waited for if the device has not come to them yet."""
        for name, start, end in self._events[:count]:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        del self._events[:count]

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _has_value(values_N: Tensor | None) -> Tensor | None:
    return None if values_N is None else ~values_N.isnan()


def _without_nan(values_N: Tensor | None) -> Tensor | None:
    return None if values_N is None else values_N.nan_to_num()


def _sum_dtype(device: torch.device) -> torch.dtype:
    # float32 stops counting at 2²⁴ tokens; MPS has nothing wider.
    return torch.float32 if device.type == "mps" else torch.float64


def _ratios(**ratios: tuple[float, float]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in ratios.items() if count > 0}

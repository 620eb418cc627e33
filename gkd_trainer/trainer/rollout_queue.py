"""The rollouts of coming windows: generated block by block with the current weights, and saved with checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDDataError, GKDRolloutError
from gkd_trainer.rollouts import (
    Block,
    Completions,
    Draw,
    Job,
    RolloutEngine,
    WindowPlan,
    WindowRollout,
    complete_greedily,
    completed_future,
    generate_jobs,
    greedy_jobs,
    has_bare_prompts,
    has_media,
    lmbda_at,
    plan_window,
    require_media_taken,
    transformers_options,
)
from gkd_trainer.trainer.preparation import require_labels
from gkd_trainer.trainer.ranks import Ranks
from gkd_trainer.trainer.recovery import Recovery
from gkd_trainer.trainer.windows import Epoch
from gkd_trainer.types import MediaTokens, Sampling

logger = logging.getLogger(__name__)


class Timer(Protocol):
    """Measures how long a block takes."""

    def measure(self, name: str) -> AbstractContextManager[None]:
        """Add the block's time to the seconds of `name`."""


@dataclass(frozen=True)
class CurrentStudent:
    """The student's current state: Trainer's `model` and `model_wrapped`, and the number of optimizer steps so far."""

    model: nn.Module
    wrapped: nn.Module
    step: int


class RolloutQueue:
    """Holds the blocks of windows that are generated or being generated, and returns one window per optimizer step.

    Args:
        engine: The student's engine, which gets the current weights before it generates.
        teacher_engine: Under `seq_kd`, the engine of the teacher.
        args: The options of sampling and of λ, with the `seed` of all draws; read in each step.
        ranks: The ranks that train together.
        recovery: Makes them fail together.
        pad_token_id: Pads the batches.
        media_tokens: The tokens that stand for images and other media.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        teacher_engine: RolloutEngine | None,
        *,
        args: Any,
        ranks: Ranks,
        recovery: Recovery,
        pad_token_id: int,
        media_tokens: MediaTokens | None = None,
    ) -> None:
        self.engine = engine
        self._teacher_engine = teacher_engine
        self._args, self._ranks, self._recovery = args, ranks, recovery
        self._pad_token_id, self._media_tokens = pad_token_id, media_tokens or MediaTokens()
        self._background = ThreadPoolExecutor(1, "rollouts") if args.rollout_overlap else None
        self._synced_version: tuple[int, ...] | None = None
        self._epoch: Iterator[Any] | None = None
        self._block: Block | None = None
        self._ahead: Block | None = None
        self._saved: list[dict[str, Any]] = []

    def next_window(self, epoch: Epoch, student: CurrentStudent, timer: Timer) -> tuple[WindowRollout, int] | None:
        """Return the window of the student's next step, and how many steps older the weights are that generated it.

        Returns None at the end of the epoch. All ranks must call it together.

        Raises:
            GKDError: Planning, generation or a sync failed; on every rank.
        """
        step = student.step
        if epoch.batches is not self._epoch:  # drop the rest of an epoch that was stopped
            self._epoch = epoch.batches
            self.drop()
            self._restore(epoch, student, timer)
        if self._block is None or not self._block.holds(step):
            self._block, self._ahead = self._ahead, None
        if self._block is None:
            self._block = self._generated(self._plans(epoch, step), student, timer)
        block = self._block
        if block is None:
            return None
        self._raise_failure(block.student_completions.exception())
        if self._background is not None and self._ahead is None:
            plans = self._plans(epoch.later(), block.next_step)
            self._ahead = self._generated(plans, student, timer, self._background)
        with self._recovery.failing_together(GKDRolloutError, "putting completions into the batches of a step"):
            window = block.window(step, self._pad_token_id)
            if window.without_prompt and self._args.is_always_on_policy and epoch.is_first:
                raise GKDDataError(
                    f"lmbda=1 trains only on completions, but {window.without_prompt} of the first {window.samples} "
                    "samples have no prompt to complete (their first token is already trained on): label prompts with "
                    "-100, or lower lmbda"
                )
        return window, step - block.weights_step

    @contextmanager
    def synced(self, student: CurrentStudent, timer: Timer | None = None) -> Iterator[RolloutEngine]:
        """Yield the engine with the student's current weights, for one call of `generate`; on all ranks together."""
        self.wait()
        # Generate with the same numerics as the loss: under autocast, the same rounding.
        with self._ranks.gathered(student.model, student.wrapped) as gathered, self._ranks.accelerator.autocast():
            version = student.step, id(gathered), sum(weight._version for weight in gathered.parameters())
            if version != self._synced_version:
                with (
                    nullcontext() if timer is None else timer.measure("sync"),
                    self._recovery.failing_together(
                        GKDRolloutError, "sending the student's weights to the rollout engine"
                    ),
                ):
                    self.engine.sync(gathered)
                self._synced_version = version
            with self._recovery.failing_together(GKDRolloutError, "generating completions"):
                yield self.engine

    def completed(self, inputs: dict[str, Any], student: CurrentStudent) -> dict[str, Any]:
        """Return a batch with the student's greedy completions, the only tokens scored; on all ranks together."""
        return self._completed(inputs, student, only_prompts=False)

    def completed_prompts(self, inputs: dict[str, Any], student: CurrentStudent) -> dict[str, Any]:
        """Return a batch with greedy completions for samples that are bare prompts; on all ranks together."""
        if not self._ranks.any(has_bare_prompts(inputs)):
            return inputs
        return self._completed(inputs, student, only_prompts=True)

    def _completed(self, inputs: dict[str, Any], student: CurrentStudent, *, only_prompts: bool) -> dict[str, Any]:
        with self._recovery.failing_together(GKDRolloutError, "planning the completions of an evaluation"):
            jobs = greedy_jobs(inputs, only_prompts, self._media_tokens)
            self._require_media_taken(jobs, self.engine)
        with self.synced(student) as engine:
            return complete_greedily(inputs, jobs, engine, self._args.max_new_tokens, self._pad_token_id, only_prompts)

    def _require_media_taken(self, jobs: Sequence[Job], engine: RolloutEngine | None) -> None:
        require_media_taken(has_media(jobs), engine is None or engine.takes_media, self._media_tokens.image)

    def wait(self) -> None:
        """Wait until no rollouts are running: the weights must not change under them."""
        self._raise_failure(next(filter(None, [block.student_completions.exception() for block in self._blocks]), None))

    def drop(self) -> None:
        """Wait for all blocks and forget them, and forget which weights the engine has."""
        for block in self._blocks:
            block.student_completions.exception()  # waits
        self._block = self._ahead = None
        self._synced_version = None

    def state(self, step: int) -> list[dict[str, Any]]:
        """Return the state for a checkpoint of that step: completions that are not trained on yet."""
        failed = any(block.student_completions.exception() is not None for block in self._blocks)
        if self._ranks.any(failed):  # then generate them again after resuming
            return []
        states = [block.state(step) for block in self._blocks]
        return [state for state in states if state["windows"]]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Take a `state`: the next epoch begins with it, if its prompts are the same."""
        self._saved = states

    def _raise_failure(self, error: BaseException | None) -> None:
        if self._ranks.any(error is not None):
            self.drop()  # a trainer that continues generates again
        self._recovery.raise_together(error, GKDRolloutError, "generating completions")

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in (self._block, self._ahead) if block is not None]

    def _plans(self, epoch: Epoch, first_step: int, windows: int | None = None) -> list[WindowPlan]:
        args, plans, num_batches = self._args, list[WindowPlan](), epoch.num_batches
        end = first_step + (windows or args.rollout_steps)
        for step in range(first_step, min(end, epoch.max_steps)):
            batches = epoch.take(num_batches, is_first=epoch.is_first and not plans)
            if not batches:
                break
            draw = Draw(
                lmbda=lmbda_at(step, epoch.max_steps, args.lmbda, args.lmbda_end, args.lmbda_schedule),
                granularity=args.lmbda_granularity,
                seed=args.seed,
                step=step,
                rank=self._ranks.index,
                world_size=self._ranks.size,
                batch_size=epoch.batch_size,
            )
            with self._recovery.failing_together(GKDRolloutError, "planning the completions of a step"):
                for batch in batches:
                    require_labels(batch)
                plan = plan_window(batches, draw, self._teacher_engine is not None, self._media_tokens)
                self._require_media_taken(plan.student_jobs, self.engine)
                self._require_media_taken(plan.teacher_jobs, self._teacher_engine)
                plans.append(plan)
            # The last window of an epoch is smaller only if the iterator ends.
            num_batches = epoch.later().num_batches
        return plans

    def _generated(
        self,
        plans: list[WindowPlan],
        student: CurrentStudent,
        timer: Timer,
        background: ThreadPoolExecutor | None = None,
    ) -> Block | None:
        """Return windows with completions by the current weights, generated now or in the background."""
        if not plans:
            return None
        student_completions = self._student_completions(plans, student, timer, background)
        return Block(plans, student_completions, self._teacher_completions(plans), student.step)

    def _student_completions(
        self,
        plans: list[WindowPlan],
        student: CurrentStudent,
        timer: Timer,
        background: ThreadPoolExecutor | None,
    ) -> Future[Completions]:
        jobs, sampling = [plan.student_jobs for plan in plans], sampling_of(self._args)
        # If no rank has a prompt for the student, the engine keeps the weights that it has.
        if not self._ranks.any(any(jobs)):
            return completed_future([[] for _ in plans])
        with self.synced(student, timer) as engine:
            if background is not None:
                return background.submit(generate_jobs, jobs, sampling, engine)
            return completed_future(generate_jobs(jobs, sampling, engine))

    def _teacher_completions(self, plans: list[WindowPlan]) -> Completions:
        if self._teacher_engine is None:
            return [[] for _ in plans]
        jobs, sampling = [plan.teacher_jobs for plan in plans], sampling_of(self._args)
        if self._args.use_vllm:  # the teacher generates with transformers even if the student generates with vLLM
            sampling = replace(sampling, extra=transformers_options(sampling.extra))
        with (
            self._ranks.accelerator.autocast(),
            self._recovery.failing_together(GKDRolloutError, "generating completions"),
        ):
            return generate_jobs(jobs, sampling, self._teacher_engine)

    def _restore(self, epoch: Epoch, student: CurrentStudent, timer: Timer) -> None:
        states, self._saved = self._saved, []
        step = student.step
        if self._ranks.any(not states or states[0]["windows"][0]["step"] != step):
            return
        blocks: list[Block | None] = []
        for state in states:
            plans = self._plans(epoch, step, len(state["windows"]))
            blocks.append(Block.restored(state, plans))
            step, epoch = step + len(plans), epoch.later()
            if self._ranks.any(blocks[-1] is None):
                logger.warning(
                    "The checkpoint's completions belong to other prompts or steps: generating them "
                    "again. A run resumes exactly only with the data, seed, batch sizes and steps of the run that "
                    "saved it."
                )
                blocks[-1] = self._generated(plans, student, timer)
        self._block, self._ahead = blocks[0], blocks[1] if len(blocks) > 1 else None


def sampling_of(args: GKDArguments) -> Sampling:
    """Return the sampling of the student's completions."""
    extra = args.generation_kwargs or {}
    assert isinstance(extra, Mapping)  # parsed
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        extra=extra,
    )


def sample_counts(window: WindowRollout, staleness: int) -> dict[str, float]:
    """Return the SAMPLE_SUMS of a window generated by weights `staleness` steps older than the current ones."""
    completions = [item.completion for item in window.generated]
    return {
        "samples": window.samples,
        "on_policy_samples": window.on_policy_samples,
        "samples_without_prompt": window.without_prompt,
        "completions": len(completions),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "truncated_completions": sum(not completion.is_finished for completion in completions),
        "stale_steps": staleness * window.on_policy_samples,
    }

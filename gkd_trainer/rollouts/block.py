"""A block: the windows of one or several optimizer steps, generated together and waiting to be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from gkd_trainer.rollouts.window import WindowPlan, WindowRollout
from gkd_trainer.types import Completion

Completions = list[list[Completion]]
"""The completions of each window of a block, in the order of its jobs."""


@dataclass(frozen=True)
class Block:
    """Windows of consecutive optimizer steps, and their completions, which may still be being generated.

    `weights_step` is the optimizer step (from 0) whose weights generate them.
    """

    plans: list[WindowPlan]
    student_completions: Future[Completions]
    teacher_completions: Completions
    weights_step: int

    @property
    def next_step(self) -> int:
        """The first step after the block."""
        return self.plans[-1].step + 1

    def holds(self, step: int) -> bool:
        """Return whether the block holds the window of a step."""
        return self.plans[0].step <= step < self.next_step

    def window(self, step: int, pad_token_id: int) -> WindowRollout:
        """Return the window of a step; waits for its completions, and raises if generating them failed."""
        index = step - self.plans[0].step
        return self.plans[index].rolled_out(
            self.student_completions.result()[index], self.teacher_completions[index], pad_token_id
        )

    def state(self, from_step: int) -> dict[str, Any]:
        """Return the state for a checkpoint of `from_step`: the completions, without the data they belong to."""
        windows = zip(self.plans, self.student_completions.result(), self.teacher_completions, strict=True)
        return {
            "weights_step": self.weights_step,
            "windows": [
                {
                    "step": plan.step,
                    "prompts": _digest(plan),
                    "student": [_saved(completion) for completion in student_completions],
                    "teacher": [_saved(completion) for completion in teacher_completions],
                }
                for plan, student_completions, teacher_completions in windows
                if plan.step >= from_step
            ],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], plans: list[WindowPlan]) -> Block | None:
        """Return the block of a `state`, or None if it had other prompts or counts than `plans`."""
        windows = state["windows"]
        if [(plan.step, _digest(plan)) for plan in plans] != [(item["step"], item["prompts"]) for item in windows]:
            return None
        counts = [(len(plan.student_jobs), len(plan.teacher_jobs)) for plan in plans]
        if counts != [(len(window["student"]), len(window["teacher"])) for window in windows]:
            return None
        return cls(
            plans,
            completed_future([[_completion(saved) for saved in window["student"]] for window in windows]),
            [[_completion(saved) for saved in window["teacher"]] for window in windows],
            int(state["weights_step"]),
        )


def completed_future(completions: Completions) -> Future[Completions]:
    """Return existing completions as a Future."""
    future: Future[Completions] = Future()
    future.set_result(completions)
    return future


def _digest(plan: WindowPlan) -> str:
    jobs = [[(job.prompt, job.seed) for job in jobs] for jobs in (plan.student_jobs, plan.teacher_jobs)]
    digest = hashlib.sha256(repr(jobs).encode())
    # Prompts may differ only in their images.
    for job in (*plan.student_jobs, *plan.teacher_jobs):
        media = {} if job.media is None else {**job.media.inputs, **job.media.per_token}
        for _, value in sorted(media.items()):
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _saved(completion: Completion) -> list[Any]:
    saved: list[Any] = [list(completion.token_ids), completion.is_finished]
    is_trained = None if completion.is_trained is None else [bool(value) for value in completion.is_trained]
    if completion.log_probs is not None:
        return [*saved, is_trained, [float(value) for value in completion.log_probs]]
    return saved if is_trained is None else [*saved, is_trained]


def _completion(saved: Sequence[Any]) -> Completion:
    # Without a third entry, all tokens are trained on; without a fourth, no log-probs are known.
    token_ids, is_finished, is_trained, log_probs = [*saved, None, None][:4]
    return Completion(token_ids, bool(is_finished), is_trained, log_probs)

"""A block: the windows of one or several optimizer steps that are generated together, and wait to be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gkd_trainer.batch import Completion
from gkd_trainer.errors import GKDDataError
from gkd_trainer.rollouts.window import WindowPlan, WindowRollout

Completions = list[list[Completion]]
"""The completions of each window of a block, in the order of its jobs."""


@dataclass
class Block:
    """Windows that are still to be trained on, and their completions, which may still be under way.

    `weights_step` is the optimizer step (from 0) whose weights generate them.
    """

    plans: list[WindowPlan]
    of_student: Future[Completions]
    of_teacher: Completions
    weights_step: int

    def pop(self, pad_token_id: int) -> WindowRollout:
        """Take the first window out, once its completions are there; raises what their generation raised."""
        of_student = self.of_student.result().pop(0)
        return self.plans.pop(0).rolled_out(of_student, self.of_teacher.pop(0), pad_token_id)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep: the completions, but not the data that they belong to."""
        windows = zip(self.plans, self.of_student.result(), self.of_teacher, strict=True)
        return {
            "weights_step": self.weights_step,
            "windows": [
                {
                    "step": plan.step,
                    "prompts": _digest(plan),
                    "student": [_row(completion) for completion in of_student],
                    "teacher": [_row(completion) for completion in of_teacher],
                }
                for plan, of_student, of_teacher in windows
            ],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], plans: list[WindowPlan]) -> Block:
        """Return the block that `state` was of, for the same windows of the data.

        Raises GKDDataError where they are not the same.
        """
        windows = state["windows"]
        if [(plan.step, _digest(plan)) for plan in plans] != [
            (window["step"], window["prompts"]) for window in windows
        ]:
            raise GKDDataError(
                "the checkpoint holds completions of other prompts than the data has now: resume with the data set, "
                "seed and batch sizes of the run that saved it, or delete its rollouts-rank*.json to generate anew"
            )
        return cls(
            plans,
            done([[_completion(row) for row in window["student"]] for window in windows]),
            [[_completion(row) for row in window["teacher"]] for window in windows],
            int(state["weights_step"]),
        )


def done(completions: Completions) -> Future[Completions]:
    """Return completions that are there already as a Future."""
    future: Future[Completions] = Future()
    future.set_result(completions)
    return future


def _digest(plan: WindowPlan) -> str:
    jobs = [[(job.prompt, job.seed) for job in jobs] for jobs in (plan.student_jobs, plan.teacher_jobs)]
    return hashlib.sha256(repr(jobs).encode()).hexdigest()


def _row(completion: Completion) -> list[Any]:
    return [list(completion.token_ids), completion.is_finished]


def _completion(row: Sequence[Any]) -> Completion:
    return Completion(row[0], bool(row[1]))

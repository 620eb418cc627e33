"""The rollouts of windows. A window is all micro-batches of an optimizer step on one rank; one call may do several."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd_trainer.rollouts import mixing
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.types import IGNORE_INDEX, Completion, Generated, Sampling

# The first position of samples beyond the batch size; each micro-batch of each rank has 32 bits for them.
_BEYOND_BATCH = 1 << 62
_BEYOND_BITS = 32


@dataclass(frozen=True)
class Draw:
    """The draw of the on-policy samples of an optimizer step, and of the seeds of their completions.

    `lmbda` is the share λ at this step, `granularity` "sample" or "batch"; (`seed`, `step`, position) key the
    generator. `batch_size` is the configured number of samples of a rank's micro-batch.
    """

    lmbda: float
    granularity: str
    seed: int
    step: int
    rank: int
    world_size: int
    batch_size: int

    def position(self, micro_batch: int, row: int) -> int:
        """Return a sample's position in the step, unique over all ranks.

        That is its place in the global batch, (micro-batch · world_size + rank) · batch_size + row, the same for any
        layout of ranks. Samples beyond `batch_size`, from a user's data loader or a balancing sampler, have unique
        positions behind all of these.
        """
        batch = micro_batch * self.world_size + self.rank
        if row < self.batch_size:
            return batch * self.batch_size + row
        return _BEYOND_BATCH + (batch << _BEYOND_BITS) + row

    def is_on_policy(self, position: int) -> bool:
        """Return whether the sample at `position` is on-policy."""
        return mixing.is_on_policy(self.lmbda, self.granularity, self.seed, self.step, position)

    def sampling_seed(self, position: int) -> int:
        """Return the seed of the completion at `position`."""
        return mixing.sampling_seed(self.seed, self.step, position)


@dataclass(frozen=True)
class Job:
    """A completion to generate: its micro-batch and row, its prompt and its seed."""

    micro_batch: int
    row: int
    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class WindowPlan:
    """A window before its rollouts: its batches, and the completions that each model must generate.

    `without_prompt` samples should be generated but have no prompt; they stay as in the data.
    """

    step: int
    batches: Sequence[Mapping[str, Any]]
    student_jobs: list[Job]
    teacher_jobs: list[Job]
    samples: int
    without_prompt: int

    def rolled_out(
        self, student_completions: Sequence[Completion], teacher_completions: Sequence[Completion], pad_token_id: int
    ) -> WindowRollout:
        """Return the window with its completions, one for each job."""
        generated: dict[tuple[int, int], Generated] = {}
        for is_on_policy, jobs, completions in (
            (True, self.student_jobs, student_completions),
            (False, self.teacher_jobs, teacher_completions),
        ):
            for job, completion in zip(jobs, completions, strict=True):
                generated[job.micro_batch, job.row] = Generated(job.prompt, completion, is_on_policy)
        mixed = []
        for micro_batch, inputs in enumerate(self.batches):
            by_row = {row: item for (batch, row), item in generated.items() if batch == micro_batch}
            mixed.append(mixing.with_completions(inputs, by_row, pad_token_id))
        return WindowRollout(mixed, list(generated.values()), self.samples, self.without_prompt)


@dataclass(frozen=True)
class WindowRollout:
    """A window after its rollouts: the batches to train on, the generated samples, and the counts of its plan."""

    batches: list[dict[str, Any]]
    generated: list[Generated]
    samples: int
    without_prompt: int

    @property
    def on_policy_samples(self) -> int:
        """How many samples the student generated."""
        return sum(generated.is_on_policy for generated in self.generated)


def plan_window(
    batches: Sequence[Mapping[str, Any]], draw: Draw, teacher_generates: bool, media_ids: Collection[int] = ()
) -> WindowPlan:
    """Return the plan of a window: which completions to generate.

    Args:
        batches: Collated batches with `input_ids` and `labels` [B, L].
        draw: Which samples are on-policy, and their seeds.
        teacher_generates: Whether the teacher completes all others (`seq_kd`), or they stay as in the data.
        media_ids: Tokens that stand for an image, a video or sound, which no engine gets.

    Raises:
        GKDDataError: a batch holds values that completions can't extend, whether or not any of its samples gets one,
            or a prompt to be completed holds one of `media_ids`.

    """
    jobs: dict[bool, list[Job]] = {True: [], False: []}
    samples = without_prompt = 0
    for micro_batch, inputs in enumerate(batches):
        mixing.require_extendable(inputs)
        for row, prompt in enumerate(mixing.prompts_of(inputs)):
            samples += 1
            position = draw.position(micro_batch, row)
            is_on_policy = draw.is_on_policy(position)
            if not is_on_policy and not teacher_generates:
                continue
            if prompt:
                mixing.require_text(prompt, media_ids)
                jobs[is_on_policy].append(Job(micro_batch, row, prompt, draw.sampling_seed(position)))
            else:
                without_prompt += 1
    return WindowPlan(draw.step, batches, jobs[True], jobs[False], samples, without_prompt)


def generate_jobs(
    windows: Sequence[Sequence[Job]], sampling: Sampling, engine: RolloutEngine
) -> list[list[Completion]]:
    """Return the completions of several windows' jobs, generated in one call.

    The engine is called even without jobs: with sharded weights, all ranks must generate together.
    """
    jobs = [job for window in windows for job in window]
    completions = iter(engine.generate([job.prompt for job in jobs], sampling, [job.seed for job in jobs]))
    return [[next(completions) for _ in window] for window in windows]


def has_bare_prompts(inputs: Mapping[str, Any]) -> bool:
    """Return whether any sample of a batch has no completion to score."""
    return bool((inputs["labels"] == IGNORE_INDEX).all(dim=1).any())


def complete_greedily(
    inputs: Mapping[str, Any],
    engine: RolloutEngine,
    max_new_tokens: int,
    pad_token_id: int,
    only_prompts: bool,
    media_ids: Collection[int] = (),
) -> dict[str, Any]:
    """Return a batch whose samples hold the engine's greedy completions of their prompts.

    With `only_prompts`, only samples without a completion get one; else all do, and samples without a prompt are not
    scored.
    """
    prompts = mixing.prompts_of(inputs)
    is_bare_prompt = (inputs["labels"] == IGNORE_INDEX).all(dim=1).tolist()
    chosen = {row: prompt for row, prompt in enumerate(prompts) if prompt and (not only_prompts or is_bare_prompt[row])}
    for prompt in chosen.values():
        mixing.require_text(prompt, media_ids)
    completions = engine.generate(list(chosen.values()), engine.greedy_sampling(max_new_tokens), [0] * len(chosen))
    by_row = {
        row: Generated(prompt, completion, is_on_policy=True)
        for (row, prompt), completion in zip(chosen.items(), completions, strict=True)
    }
    completed = mixing.with_completions(inputs, by_row, pad_token_id)
    if not only_prompts:
        labels_BL = completed["labels"].clone()
        labels_BL[[row for row in range(len(prompts)) if row not in by_row]] = IGNORE_INDEX
        completed["labels"] = labels_BL
    return completed

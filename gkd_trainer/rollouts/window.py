"""The rollouts of windows: a window is all micro-batches of an optimizer step on one rank; a call may do several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.rollouts import mixing
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.media import media_of
from gkd_trainer.types import Completion, Generated, MediaTokens, PromptMedia, Sampling

# The first position of samples beyond the batch size; each micro-batch of each rank has 32 bits for them.
_BEYOND_BATCH = 1 << 62
_BEYOND_BITS = 32

_NO_MEDIA = MediaTokens()


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
        positions after all of these.
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
    """A completion to generate: its micro-batch and row, its prompt, its seed, and the prompt's images, if any."""

    micro_batch: int
    row: int
    prompt: list[int]
    seed: int
    media: PromptMedia | None = None


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
    batches: Sequence[Mapping[str, Any]],
    draw: Draw,
    teacher_generates: bool,
    media_tokens: MediaTokens = _NO_MEDIA,
) -> WindowPlan:
    """Return the plan of a window: which completions to generate.

    Args:
        batches: Collated batches with `input_ids` and `labels` [B, L].
        draw: Which samples are on-policy, and their seeds.
        teacher_generates: Whether the teacher completes all others (`seq_kd`), or they stay as in the data.
        media_tokens: The tokens that stand for images and other media.

    Raises:
        GKDDataError: a batch holds values that completions can't extend, whether or not any of its samples gets one,
            or the images of a prompt to be completed can't be found (see `media_of`).

    """
    jobs: dict[bool, list[Job]] = {True: [], False: []}
    samples = without_prompt = 0
    for micro_batch, inputs in enumerate(batches):
        mixing.require_extendable(inputs)
        chosen: dict[int, tuple[list[int], bool]] = {}
        for row, prompt in enumerate(mixing.prompts_of(inputs)):
            samples += 1
            is_on_policy = draw.is_on_policy(draw.position(micro_batch, row))
            if not is_on_policy and not teacher_generates:
                continue
            if prompt:
                chosen[row] = prompt, is_on_policy
            else:
                without_prompt += 1
        media = media_of(inputs, {row: prompt for row, (prompt, _) in chosen.items()}, media_tokens)
        for row, (prompt, is_on_policy) in chosen.items():
            seed = draw.sampling_seed(draw.position(micro_batch, row))
            jobs[is_on_policy].append(Job(micro_batch, row, prompt, seed, media.get(row)))
    return WindowPlan(draw.step, batches, jobs[True], jobs[False], samples, without_prompt)


def generate_jobs(
    windows: Sequence[Sequence[Job]], sampling: Sampling, engine: RolloutEngine
) -> list[list[Completion]]:
    """Return the completions of several windows' jobs, generated in one call.

    The engine is called even without jobs: with sharded weights, all ranks must generate together.
    """
    jobs = [job for window in windows for job in window]
    media: dict[str, Any] = {"media": [job.media for job in jobs]} if has_media(jobs) else {}
    completions = iter(engine.generate([job.prompt for job in jobs], sampling, [job.seed for job in jobs], **media))
    return [[next(completions) for _ in window] for window in windows]


def has_media(jobs: Sequence[Job]) -> bool:
    """Return whether any prompt has images."""
    return any(job.media is not None for job in jobs)


def has_bare_prompts(inputs: Mapping[str, Any]) -> bool:
    """Return whether any sample of a batch has no completion to score."""
    return bool((inputs["labels"] == IGNORE_INDEX).all(dim=1).any())


def greedy_jobs(inputs: Mapping[str, Any], only_prompts: bool, media_tokens: MediaTokens = _NO_MEDIA) -> list[Job]:
    """Return the completions that an evaluation of a batch needs.

    Args:
        inputs: A collated batch.
        only_prompts: Whether only samples without a completion get one; else all with a prompt do.
        media_tokens: The tokens that stand for images and other media.

    Raises:
        GKDDataError: The images of a prompt can't be found (see `media_of`).
    """
    is_bare_prompt = (inputs["labels"] == IGNORE_INDEX).all(dim=1).tolist()
    chosen = {
        row: prompt
        for row, prompt in enumerate(mixing.prompts_of(inputs))
        if prompt and (not only_prompts or is_bare_prompt[row])
    }
    media = media_of(inputs, chosen, media_tokens)
    return [Job(0, row, prompt, 0, media.get(row)) for row, prompt in chosen.items()]


def complete_greedily(
    inputs: Mapping[str, Any],
    jobs: Sequence[Job],
    engine: RolloutEngine,
    max_new_tokens: int,
    pad_token_id: int,
    only_prompts: bool,
) -> dict[str, Any]:
    """Return a batch whose samples hold the engine's greedy completions of their prompts.

    `jobs` are its `greedy_jobs`. Without `only_prompts`, samples without a prompt are not scored.
    """
    [completions] = generate_jobs([jobs], engine.greedy_sampling(max_new_tokens), engine)
    by_row = {
        job.row: Generated(job.prompt, completion, is_on_policy=True)
        for job, completion in zip(jobs, completions, strict=True)
    }
    completed = mixing.with_completions(inputs, by_row, pad_token_id)
    if not only_prompts:
        labels_BL = completed["labels"].clone()
        labels_BL[[row for row in range(len(labels_BL)) if row not in by_row]] = IGNORE_INDEX
        completed["labels"] = labels_BL
    return completed

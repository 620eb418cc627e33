"""Rollouts: prompts turned into completions, and the draw of the samples that get them."""

from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.block import Block, Completions, completed_future
from gkd_trainer.rollouts.build import (
    build_student_engine,
    build_teacher_engine,
    find_stop_ids,
    refuse_engine,
    sampled_vocabulary_size,
)
from gkd_trainer.rollouts.hf import HFRollouts
from gkd_trainer.rollouts.media import require_media_taken
from gkd_trainer.rollouts.mixing import lmbda_at
from gkd_trainer.rollouts.vllm_colocate import VLLMColocateRollouts
from gkd_trainer.rollouts.vllm_sampling import transformers_options
from gkd_trainer.rollouts.vllm_server import VLLMServerRollouts
from gkd_trainer.rollouts.window import (
    Draw,
    Job,
    WindowPlan,
    WindowRollout,
    complete_greedily,
    generate_jobs,
    greedy_jobs,
    has_bare_prompts,
    has_media,
    plan_window,
)

__all__ = [
    "Block",
    "Completions",
    "Draw",
    "HFRollouts",
    "Job",
    "RolloutEngine",
    "VLLMColocateRollouts",
    "VLLMServerRollouts",
    "WindowPlan",
    "WindowRollout",
    "build_student_engine",
    "build_teacher_engine",
    "complete_greedily",
    "completed_future",
    "find_stop_ids",
    "generate_jobs",
    "greedy_jobs",
    "has_bare_prompts",
    "has_media",
    "lmbda_at",
    "plan_window",
    "refuse_engine",
    "require_media_taken",
    "sampled_vocabulary_size",
    "transformers_options",
]

"""Rollouts: prompts turned into completions, and the draw of the samples that get them."""

from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.hf import HFRollouts
from gkd_trainer.rollouts.mixing import lmbda_at
from gkd_trainer.rollouts.window import Draw, WindowRollout, complete_greedily, has_prompts_alone, roll_out_window

__all__ = [
    "Draw",
    "HFRollouts",
    "RolloutEngine",
    "WindowRollout",
    "complete_greedily",
    "has_prompts_alone",
    "lmbda_at",
    "roll_out_window",
]

"""The trainer: `trainer.py` composes the stages on Trainer's hooks, and the other files are its parts."""

from gkd_trainer.trainer.trainer import GKDMixin, GKDTrainer

__all__ = ["GKDMixin", "GKDTrainer"]

"""The trainer: `trainer.py` connects the stages to Trainer's hooks; the other files are its parts."""

from gkd_trainer.trainer.caching import cache_predictions
from gkd_trainer.trainer.trainer import GKDMixin, GKDTrainer

__all__ = ["GKDMixin", "GKDTrainer", "cache_predictions"]

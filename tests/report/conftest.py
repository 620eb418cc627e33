"""Trainers whose runs are reported."""

from tests.trainer.conftest import config, make_trainer, token_rows

__all__ = ["config", "make_trainer", "token_rows"]

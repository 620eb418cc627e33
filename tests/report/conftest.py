"""Trainers whose runs are reported."""

from tests.trainer.conftest import config, full_run, make_trainer, token_rows

__all__ = ["config", "full_run", "make_trainer", "token_rows"]

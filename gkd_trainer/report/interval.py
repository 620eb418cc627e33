"""How often a run is logged where its configuration leaves that open."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gkd_trainer.config import Unset

MAX_STEPS = 500


class TenthOfRun(TrainerCallback):
    """Logs at every tenth of a run, and at least every 500 steps, where `logging_steps` is unset."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the interval, which is known once the length of the run is."""
        if isinstance(args.logging_steps, Unset):
            state.logging_steps = min(MAX_STEPS, max(1, state.max_steps // 10))

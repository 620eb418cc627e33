"""Options changed after a trainer was built, whose new values would have no effect, or only half of one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from gkd_trainer.config import GKDArguments
from gkd_trainer.config_checks import check_combinations
from gkd_trainer.config_effects import Run
from gkd_trainer.config_values import check_ranges
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import redacted

_READ_WHEN_USED = {
    "lmbda",
    "lmbda_end",
    "lmbda_schedule",
    "lmbda_granularity",
    "beta",
    "divergence",
    "divergence_options",
    "loss_workspace_mb",
    "loss_product_dtype",
    "divergence_scale",
    "loss_temperature",
    "ce_weight",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "rollout_steps",
    "teacher_tail",
    "disable_dropout",
    "eval_on_policy",
    "log_completions",
    "num_completions_to_print",
}


class FixedOptions:
    """The options for which a trainer's rows were prepared, and its teacher and engines built.

    Args:
        run: What is known of the trainer, with its options.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._built_for = run, copy.copy(run.args)

    def require_unchanged(self, args: Any) -> None:
        """Raise GKDConfigError if options were changed that can't be, or to values that are invalid.

        λ may change between values for which the rows are the same.
        """
        check_ranges(args, dataclasses.fields(GKDArguments))
        before = self._built_for
        fixed = {option.name for option in dataclasses.fields(GKDArguments)} - _READ_WHEN_USED
        # Rows have room for completions only if some are generated, and may be prompts if all are.
        if (args.generates and not before.generates) or (before.is_always_on_policy and not args.generates):
            fixed |= {"lmbda", "lmbda_end"}
        if args.eval_on_policy:  # so may those to evaluate on; without it they are read as they are
            fixed.add("eval_on_policy")
        for name in sorted(fixed):
            then, now = getattr(before, name), getattr(args, name)
            if now != then:
                now, then = redacted(now, name), redacted(then, name)
                raise GKDConfigError(
                    f"{name} is {now!r}, but was {then!r} when this trainer prepared its rows and built its teacher "
                    f"and engines, which can't follow: build a new trainer with {name}={now!r}, or set it to {then!r} "
                    "again"
                )
        check_combinations(dataclasses.replace(self._run, args=args))

"""Options changed after a trainer was built, whose new values would have no effect, or only half of one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import datasets

from gkd_trainer.batch_keys import IGNORE_INDEX
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

_GENERATING = ("lmbda", "lmbda_end", "seq_kd")


class FixedOptions:
    """The options for which a trainer's rows were prepared, and its teacher and engines built.

    Args:
        run: What is known of the trainer, with its options.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._built_for = self._began_with = copy.copy(run.args)
        self._complete_rows: Any = None

    @property
    def generates_in_run(self) -> bool:
        """Whether the run began with options by which samples may be generated."""
        return bool(self._began_with.generates)

    def require_unchanged(self, args: Any) -> None:
        """Raise GKDConfigError if a run begins with options changed that can't be, or to values that are invalid.

        λ may change between values for which the rows are the same; see `require_completions`.
        """
        check_ranges(args, dataclasses.fields(GKDArguments))
        before = self._built_for
        fixed = {option.name for option in dataclasses.fields(GKDArguments)} - _READ_WHEN_USED
        if args.generates and not before.generates:  # rows have room for completions only if some are generated
            fixed |= {"lmbda", "lmbda_end"}
        if args.eval_on_policy:  # so may those to evaluate on; without it they are read as they are
            fixed.add("eval_on_policy")
        for name in sorted(fixed):
            if getattr(args, name) != getattr(before, name):
                raise self._changed(name, args, "and built its teacher and engines, which can't follow")
        check_combinations(dataclasses.replace(self._run, args=args))
        self._began_with = copy.copy(args)

    def require_usable_rows(self, args: Any, rows: Any) -> None:
        """Raise GKDConfigError if a callback changed λ in the middle of a run to values that its rows don't serve.

        Args:
            args: The options now.
            rows: The prepared training set.
        """
        if args.generates and not self.generates_in_run:
            then = self._began_with
            name = next(each for each in _GENERATING if getattr(args, each) != getattr(then, each))
            now, before = getattr(args, name), getattr(then, name)
            raise GKDConfigError(
                f"{name} is {now!r}, but was {before!r} when this run began, which left no room for completions: "
                f"build the trainer with {name}={now!r}; a callback may set lmbda=0 from on_train_begin on, and raise "
                "it later"
            )
        self.require_completions(args, rows)

    def require_completions(self, args: Any, rows: Any) -> None:
        """Raise GKDConfigError if λ was 1, so that rows may be bare prompts, and now some samples need a completion.

        Args:
            args: The options now.
            rows: The prepared training set.
        """
        before = self._built_for
        if not before.is_always_on_policy or args.is_always_on_policy or rows is self._complete_rows:
            return
        if isinstance(rows, datasets.Dataset):
            number = _first_bare_prompt(rows)
            if number is None:
                self._complete_rows = rows
                return
            reason = f"and row {number}, a prompt without a completion, can't be trained on off-policy"
        elif isinstance(rows, datasets.IterableDataset):
            reason = "without requiring completions, which streamed rows may lack"
        else:  # used as they are, whatever λ is
            return
        name = next(each for each in ("lmbda", "lmbda_end") if getattr(args, each) != getattr(before, each))
        raise self._changed(name, args, reason)

    def _changed(self, name: str, args: Any, reason: str) -> GKDConfigError:
        now, then = (redacted(getattr(each, name), name) for each in (args, self._built_for))
        return GKDConfigError(
            f"{name} is {now!r}, but was {then!r} when this trainer prepared its rows {reason}: build a new trainer "
            f"with {name}={now!r}, or set it to {then!r} again"
        )


def _first_bare_prompt(rows: datasets.Dataset) -> int | None:
    """Return the number of the first prepared row without a token to train on; None if there is none."""
    number = 0
    for batch in rows.with_format(None).select_columns(["labels"]).iter(batch_size=1000):
        for labels in batch["labels"]:
            if all(label == IGNORE_INDEX for label in labels):
                return number
            number += 1
    return None

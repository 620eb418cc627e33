"""A configuration with the options of distillation, from whatever was passed as `args`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from gkd_trainer.compat import DEFAULT_LOSSES
from gkd_trainer.config import GKDArguments, GKDConfig
from gkd_trainer.errors import GKDConfigError

_READ_OF_TRL = ("SFTConfig", "GKDConfig")


def completed_args(args: TrainingArguments | None, is_plain_trainer: bool, *, is_seq2seq: bool = False) -> Any:
    """Return a configuration with GKDArguments; for the plain Trainer, made from TrainingArguments or None.

    Raises GKDConfigError if another trainer is extended and its configuration has no GKDArguments, or, for a
    Seq2SeqTrainer, no Seq2SeqTrainingArguments; for the plain Trainer, if anything of the user's would be lost.
    """
    if is_seq2seq and not (isinstance(args, GKDArguments) and isinstance(args, Seq2SeqTrainingArguments)):
        raise GKDConfigError(
            f"args must have the options of distillation and of Seq2SeqTrainer; got {type(args).__name__}: derive "
            "`class MyConfig(GKDArguments, Seq2SeqTrainingArguments)`, decorated with @dataclass"
        )
    if isinstance(args, GKDArguments):
        return args
    if not is_plain_trainer:
        raise GKDConfigError(
            f"args must have the options of distillation; got {type(args).__name__}. Derive them from the "
            "configuration of the trainer that you extend: `class MyConfig(GKDArguments, trl.SFTConfig)`, decorated "
            "with @dataclass"
        )
    if args is None:
        return GKDConfig(output_dir="tmp_trainer")
    _refuse_other_trainers(args)
    _refuse_own_members(args)
    return _taken_over(args)


def _refuse_other_trainers(args: TrainingArguments) -> None:
    """Raise GKDConfigError for a configuration of TRL whose options have other names or meanings."""
    of_trl = next((cls for cls in type(args).__mro__ if _package(cls) == "trl"), None)
    if of_trl is not None and of_trl.__name__ not in _READ_OF_TRL:
        raise GKDConfigError(
            f"args is a {of_trl.__name__} of trl, whose options differ from those here in names, defaults or meaning: "
            "use GKDConfig (docs/migrating.md lists what became of each option)"
        )


def _refuse_own_members(args: TrainingArguments) -> None:
    """Raise GKDConfigError if a class of the user's defines what would be missing in a GKDConfig."""
    own = [cls for cls in type(args).__mro__ if _package(cls) not in ("transformers", "trl", "builtins")]
    inherited = {option.name for cls in type(args).__mro__ if cls not in own for option in _options(cls)}
    members = [option.name for option in dataclasses.fields(args) if own and option.name not in inherited]
    members += [name for cls in own for name in vars(cls) if not name.startswith("_")]
    missing = [name for name in dict.fromkeys(members) if not hasattr(GKDConfig, name) and name not in _known()]
    if missing:
        name = type(args).__name__
        raise GKDConfigError(
            f"{', '.join(missing)} of {name}: a GKDConfig made from it would not have them. Derive {name} from "
            f"GKDConfig, or pass a `class MyConfig(GKDArguments, {name})`, decorated with @dataclass"
        )


def _taken_over(args: TrainingArguments) -> GKDConfig:
    """Return a GKDConfig with the values of a configuration, and with attributes that were set on it.

    Raises GKDConfigError for options with other values than their defaults that GKDConfig does not have.
    """
    defaults = {option.name: _default(option) for option in dataclasses.fields(args)}
    given = {option.name: getattr(args, option.name) for option in dataclasses.fields(args) if option.init}
    foreign = [
        name
        for name, value in given.items()
        if name not in _known()
        and value not in (defaults[name], None)
        and not (name == "loss_type" and value in DEFAULT_LOSSES)
    ]
    if foreign:
        raise GKDConfigError(
            f"{', '.join(foreign)}: options of {type(args).__name__} that GKDConfig does not have. Derive "
            f"`class MyConfig(GKDArguments, {type(args).__name__})`, and put GKDMixin in front of a trainer that has "
            "them"
        )
    # At the default of trl's GKDConfig the user did not set it, and it may be fitted to max_length.
    if given.get("max_new_tokens") == defaults.get("max_new_tokens"):
        given.pop("max_new_tokens", None)
    if args.logging_steps == type(args).logging_steps == TrainingArguments.logging_steps:
        del given["logging_steps"]  # may be unset
    config = GKDConfig(**{name: value for name, value in given.items() if name in _known()})
    for name, value in vars(args).items():
        if not name.startswith("_") and name not in defaults and not hasattr(config, name):
            setattr(config, name, value)
    return config


def _known() -> set[str]:
    return {option.name for option in dataclasses.fields(GKDConfig)}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _options(cls: Any) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()

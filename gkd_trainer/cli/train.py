"""`gkd-trainer train`: distil a teacher into a student."""

from __future__ import annotations

import importlib
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gkd_trainer.cli.train_options import TrainOptions, parse, refusing_as_configuration
from gkd_trainer.errors import GKDConfigError, GKDError
from gkd_trainer.quiet import quiet_imports
from gkd_trainer.redaction import redacted

if TYPE_CHECKING:
    from gkd_trainer.config import GKDConfig
    from gkd_trainer.data.sources import RowSource
    from gkd_trainer.trainer import GKDTrainer

SUMMARY = "distil a teacher into a student"

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> None:
    """Train the student, evaluate it if there are rows to evaluate on, and save it with its tokenizer and model card.

    Raises:
        SystemExit: With status 2, for options that can't be parsed; with status 0, after help.
        GKDError: Input that can't be used, or a failed run, with a note on how to resume it.
    """
    with quiet_imports():
        importlib.import_module("gkd_trainer.config")
        importlib.import_module("peft")
    options = parse(arguments)
    config = options.config
    peft_config = options.student.lora_config(config.disable_dropout)
    train_source, eval_source = options.data.sources(config)
    resumed_from = checkpoint_to_resume(config)
    _require_models(options)
    if peft_config is not None and _is_encoder_decoder(options):
        peft_config.task_type = "SEQ_2_SEQ_LM"  # by which PEFT's auto classes load the adapter
    train_rows, eval_rows = _load(train_source, eval_source)

    from gkd_trainer.data.sources import naming_broken_lines
    from gkd_trainer.trainer import GKDTrainer

    with refusing_as_configuration(), naming_broken_lines(train_source, eval_source):
        trainer = GKDTrainer(
            options.student.model_name_or_path,
            config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            peft_config=peft_config,
        )
    with naming_broken_lines(train_source, eval_source):
        _train_and_save(trainer, resumed_from, evaluates=eval_rows is not None)
    trainer.create_model_card(dataset=train_source.name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset=train_source.name)
    trainer.rollouts.close()
    trainer.accelerator.end_training()


def checkpoint_to_resume(config: GKDConfig) -> str | None:
    """Return the checkpoint to resume from, or None; "true" means the last complete one in output_dir.

    Raises GKDConfigError if there is none, or if it is incomplete.
    """
    from gkd_trainer.trainer.checkpoints import last_complete_checkpoint, required_complete

    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "no", "off"):
        return None
    if wanted.lower() in ("true", "yes", "on"):
        return str(last_complete_checkpoint(config.output_dir or ""))
    return str(required_complete(wanted))


def _require_models(options: TrainOptions) -> None:
    student, config = options.student, options.config
    several = config.teachers if isinstance(config.teachers, dict) else {}
    for option, name, init_kwargs in (
        ("model_name_or_path", student.model_name_or_path, config.model_init_kwargs),
        ("teacher_model_name_or_path", config.teacher_model_name_or_path, config.teacher_model_init_kwargs),
        *(("teachers", name, config.teacher_model_init_kwargs) for name in several.values()),
    ):
        if name is not None:  # the teacher may be behind a server
            require_model(option, name, init_kwargs, config.trust_remote_code)


def _is_encoder_decoder(options: TrainOptions) -> bool:
    from gkd_trainer.models.loading import stored_config

    given: Any = options.config.model_init_kwargs or {}
    kwargs = {"trust_remote_code": options.config.trust_remote_code, **given}
    with refusing_as_configuration():  # an adapter's folder may name a model that does not exist
        return bool(stored_config(options.student.model_name_or_path or "", kwargs).is_encoder_decoder)


def require_model(option: str, name: str, init_kwargs: Any, trust_remote_code: bool) -> None:
    """Raise GKDConfigError if no model has this name, before any data or weights are loaded."""
    from gkd_trainer.models.loading import stored_config

    try:
        stored_config(name, {"trust_remote_code": trust_remote_code, **(init_kwargs or {})})
    except Exception as error:  # a malformed config fails in any way
        raise GKDConfigError(
            f"--{option}: expected a folder with a model, or the name of one on the hub; got {name!r}: {error}"
        ) from error


def _load(train_source: RowSource, eval_source: RowSource | None) -> tuple[Any, Any]:
    """Return the rows to train on and those to evaluate on (or None); warn if they overlap."""
    from gkd_trainer.data.sources import in_format

    loaded = train_source.load()
    train_rows = in_format(train_source, loaded)
    if eval_source is None:
        return train_rows, None
    eval_rows = in_format(eval_source, eval_source.load())
    if train_source.overlaps(loaded, eval_source):
        logger.warning(
            "%s: %s and %s overlap: some rows are both trained on and evaluated on",
            redacted(train_source.name),
            train_source.split,
            eval_source.split,
        )
    return train_rows, eval_rows


def _train_and_save(trainer: GKDTrainer, resumed_from: str | None, evaluates: bool) -> None:
    with _noting_how_to_resume(trainer):
        metrics = trainer.train(resume_from_checkpoint=resumed_from).metrics
    trainer.save_model(_internal_call=True)  # not pushed yet: that is done at the end, with the name of the dataset
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if evaluates:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()  # with the evaluation, for a report


@contextmanager
def _noting_how_to_resume(trainer: GKDTrainer) -> Iterator[None]:
    """Add a note to an exception that stops the run: how to resume from the last checkpoint."""
    from transformers import ProgressCallback

    from gkd_trainer.trainer.checkpoints import find_last_complete

    try:
        yield
    except (KeyboardInterrupt, GKDError) as stop:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):  # else the bars are drawn again, below the message
                for bar in (callback.training_bar, callback.prediction_bar):
                    if bar is not None:
                        bar.close()
        last, output_dir = trainer.last_checkpoint, str(trainer.args.output_dir)
        if last is not None:
            source = "true" if find_last_complete(output_dir)[0] == last else shlex.quote(str(last))
            stop.add_note(f"{last} is saved: to resume from it, add --resume_from_checkpoint {source}")
        elif isinstance(stop, KeyboardInterrupt):
            stop.add_note(f"no checkpoint was saved in {output_dir} yet (--save_steps sets how often)")
        raise

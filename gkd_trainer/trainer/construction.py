"""The arguments of a trainer, completed and checked before anything is built from them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import TrainingArguments

from gkd_trainer.compat import DEFAULT_LOSSES
from gkd_trainer.config import GKDArguments, GKDConfig
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.loading import name_of
from gkd_trainer.redaction import redacted
from gkd_trainer.teachers import FrozenTeacher, Teacher, VLLMServerTeacher

logger = logging.getLogger(__name__)


def refuse_trls_order(args: object, data_collator: object, name: str) -> None:
    """Raise GKDConfigError for `GKDTrainer(student, teacher, config)`: TRL's order of arguments, not Trainer's."""
    for position, argument, is_valid in (
        ("args, the second argument,", args, args is None or isinstance(args, TrainingArguments)),
        ("data_collator, the third argument,", data_collator, not isinstance(data_collator, TrainingArguments)),
    ):
        if not is_valid:
            expected = "a GKDConfig or TrainingArguments" if argument is args else "a data collator"
            raise GKDConfigError(
                f"{position} must be {expected}; got {type(argument).__name__}. The order is Trainer's, and the "
                f"teacher goes by keyword: {name}(student, teacher_model=teacher, args=config, ...)"
            )


def completed_args(args: TrainingArguments | None, is_plain_trainer: bool) -> Any:
    """Return a configuration with GKDArguments; for the plain Trainer, made from TrainingArguments or from nothing.

    Raises GKDConfigError where another trainer is extended and its configuration has no GKDArguments.
    """
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
    known = {field.name for field in dataclasses.fields(GKDConfig)}
    defaults = {field.name: _default(field) for field in dataclasses.fields(args)}
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    foreign = [
        field.name
        for field in dataclasses.fields(args)
        if field.name in given
        and field.name not in known
        and given[field.name] not in (defaults[field.name], None)
        and not (field.name == "loss_type" and given[field.name] in DEFAULT_LOSSES)
    ]
    if foreign:
        raise GKDConfigError(
            f"{', '.join(foreign)}: options of {type(args).__name__} that GKDConfig does not have. Derive "
            f"`class MyConfig(GKDArguments, {type(args).__name__})` for a trainer that has them, with GKDMixin in front"
        )
    # At the default of trl's GKDConfig it was not chosen, and may be fitted to max_length.
    if given.get("max_new_tokens") == defaults.get("max_new_tokens"):
        given.pop("max_new_tokens", None)
    if args.logging_steps == type(args).logging_steps == TrainingArguments.logging_steps:
        del given["logging_steps"]  # which can't be told from unset
    return GKDConfig(**{name: value for name, value in given.items() if name in known})


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def init_parameters(classes: Sequence[type]) -> dict[str, Parameter]:
    """Return what the first class takes at construction, and through its `**kwargs` the ones behind it."""
    parameters: dict[str, Parameter] = {}
    for cls in classes:
        own = [p for p in signature(cls.__init__).parameters.values() if "__init__" in vars(cls)]  # type: ignore[misc]
        for parameter in own:
            if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
                parameters.setdefault(parameter.name, parameter)
        if own and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


def accepted_by(parameters: Mapping[str, Parameter], arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments that a trainer's `__init__` takes; those it doesn't take are left out where unused.

    Raises TypeError for one that was given and that the trainer does not take.
    """
    accepted = {}
    for key, value in arguments.items():
        if key in parameters:
            accepted[key] = value
        elif value is not None and value != (None, None):
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
    return accepted


def build_teacher(args: Any, teacher: Teacher | None, teacher_model: Any, trust_remote_code: bool) -> Teacher:
    """Return the one teacher that was given, as an object, a model, a name or path, or the address of its servers.

    Raises GKDTeacherError where there is none, or more than one.
    """
    name, urls, top_k = args.teacher_model_name_or_path, args.teacher_server_base_url, args.teacher_top_k
    init_kwargs = args.teacher_model_init_kwargs
    if isinstance(teacher_model, Teacher):
        raise GKDTeacherError(f"teacher_model is a {type(teacher_model).__name__}: pass a Teacher as teacher")
    if teacher is None and teacher_model is None and name is None and urls is None:
        raise GKDTeacherError(
            "no teacher: pass teacher_model (a model, a name or a path), teacher (a Teacher), or set "
            "args.teacher_model_name_or_path or args.teacher_server_base_url"
        )
    if (teacher is not None) + (teacher_model is not None) + (urls is not None) > 1:
        raise GKDTeacherError("got more than one of teacher, teacher_model and args.teacher_server_base_url: keep one")
    given = teacher_model if teacher_model is not None else teacher
    if given is not None and name is not None and not _is_named(given, name):
        raise GKDTeacherError(
            f"got a teacher and args.teacher_model_name_or_path={name!r}, which the teacher was not loaded from: keep "
            "the one that is to teach"
        )
    source = teacher_model if teacher_model is not None else name
    if teacher is None and isinstance(source, str | os.PathLike):
        options = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        return FrozenTeacher.from_pretrained(source, top_k=top_k, **options)
    if init_kwargs is not None:
        raise GKDTeacherError(
            "teacher_model_init_kwargs load a teacher by name, but the teacher given is loaded already: drop them, or "
            "pass the teacher's name"
        )
    if teacher is not None:
        if top_k is not None:
            raise GKDTeacherError(
                "teacher_top_k is set for a teacher that is given as an object: pass it top_k instead"
            )
        return teacher
    if teacher_model is not None:
        return FrozenTeacher(teacher_model, trust_remote_code=trust_remote_code, top_k=top_k)
    return VLLMServerTeacher(
        urls,
        **({} if top_k is None else {"top_k": top_k}),
        api_token=args.teacher_server_api_token,
        server_timeout=args.vllm_server_timeout,
        request_timeout=args.vllm_request_timeout,
        checks=args.teacher_server_checks,
    )


def _is_named(teacher: Any, name: str) -> bool:
    if not isinstance(teacher, str | os.PathLike):
        teacher = name_of(teacher.model if isinstance(teacher, Teacher) else teacher)
    given, named = Path(teacher), Path(name)
    return given == named or (given.exists() and named.exists() and given.samefile(named))


def warn_of_unused(options: Sequence[tuple[str, str]], args: Any) -> None:
    """Log the options that were set and have no effect, each with what it needs."""
    if options:
        listed = "; ".join(f"{name}={redacted(getattr(args, name), name)!r} needs {need}" for name, need in options)
        logger.warning("Options without effect in this run: %s.", listed)


def refuse_meaningless(args: Any, compute_loss_func: object, peft_config: PeftConfig | None) -> None:
    """Raise GKDConfigError for what Trainer takes but distillation would have to ignore."""
    if compute_loss_func is not None:
        raise GKDConfigError(
            "compute_loss_func would replace the divergence: override compute_loss in a subclass instead"
        )
    if args.label_smoothing_factor != 0:
        raise GKDConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths labels, and the targets here are the "
            "teacher's distributions: set it to 0 (loss_temperature smooths both sides)"
        )
    if peft_config is not None and getattr(peft_config, "is_prompt_learning", False):
        raise GKDConfigError(
            f"{type(peft_config).__name__} learns virtual tokens that the teacher does not see: use an adapter that "
            "changes weights, such as peft.LoraConfig"
        )


def refuse_data_parallel(args: Any) -> None:
    """Raise GKDConfigError where Trainer would copy the model to several GPUs inside one process."""
    if args.n_gpu > 1:
        raise GKDConfigError(
            f"{args.n_gpu} GPUs are visible to this one process, which Trainer would drive with nn.DataParallel: "
            "start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def refuse_dropped_deepspeed(args: Any, is_deepspeed_enabled: bool) -> None:
    """Raise GKDConfigError where DeepSpeed was asked for and Accelerate goes on without it: under DDP, or alone."""
    if args.deepspeed is not None and not is_deepspeed_enabled:
        raise GKDConfigError(
            "deepspeed is set, but Accelerate does not run it (use_cpu="
            f"{args.use_cpu}, ACCELERATE_USE_CPU={os.environ.get('ACCELERATE_USE_CPU')}): unset ACCELERATE_USE_CPU, "
            "which switches it off, or leave deepspeed out. On a CPU it runs with use_cpu=True; if not so here, set "
            "ACCELERATE_TORCH_DEVICE=cpu and ACCELERATE_USE_DEEPSPEED=true, make a PartialState(backend='gloo') first, "
            "and set accelerator_config={'use_configured_state': True}"
        )

"""The arguments of a trainer, completed and checked before anything is built from them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Seq2SeqTrainer, TrainingArguments, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from gkd_trainer.compat import checkpoints_activations, find_unused_parameters
from gkd_trainer.config_effects import Run
from gkd_trainer.data import EncoderDecoderCollator, ImageProcessing, StackOthers, can_pad, first_row
from gkd_trainer.divergence.options import check_tail
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.decoders import is_encoder_decoder
from gkd_trainer.models.device_map import accelerators_of, refuse_offloaded
from gkd_trainer.models.loading import (
    base_model,
    find_processing_class,
    load_student,
    name_of,
    refuse_frozen,
    refuse_packed_by_forwards,
    refuse_prompt_learning,
    uncompiled,
    wrap_in_adapter,
)
from gkd_trainer.redaction import redacted
from gkd_trainer.teacher_checks import check_cache, check_loss_temperature
from gkd_trainer.teachers import CachedTeacher, Teacher, all_teachers
from gkd_trainer.teachers.build import build_teacher
from gkd_trainer.trainer.configuration import completed_args
from gkd_trainer.trainer.preparation import pad_token_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Construction:
    """What a trainer is built from.

    `base_arguments` are for the extended trainer's `__init__`. `adapter` is the adapter to wrap each student in, if the
    extended trainer does not. `prepares_rows` says whether we turn rows into tokens, and `images` how those of their
    images, if the student takes any. `run` decides which options have an effect. `base` is the extended trainer.
    """

    base_arguments: dict[str, Any]
    teacher: Teacher
    adapter: PeftConfig | None
    prepares_rows: bool
    images: ImageProcessing | None
    run: Run
    base: Base


@dataclass(frozen=True)
class Base:
    """The extended trainer: whether it is TRL's, which loads and wraps the student itself, or a Seq2SeqTrainer."""

    is_trls: bool
    is_seq2seq: bool

    @classmethod
    def of(cls, classes: Sequence[type]) -> Base:
        """Return what the classes behind GKDMixin are."""
        return cls("peft_config" in init_parameters(classes), any(issubclass(each, Seq2SeqTrainer) for each in classes))


def construct(
    arguments: Mapping[str, Any],
    base_classes: Sequence[type],
    name: str,
    *,
    teacher: Teacher | None,
    teacher_model: Any,
    peft_config: PeftConfig | None,
    builds_rollouts: bool,
) -> Construction:
    """Complete and check the arguments of a trainer, and load models given by name.

    Args:
        arguments: The arguments shared with Trainer, by name.
        base_classes: The extended trainer and its bases.
        name: The trainer's class, for errors.
        teacher: See GKDMixin.
        teacher_model: See GKDMixin.
        peft_config: See GKDMixin.
        builds_rollouts: Whether no engine was passed.

    Raises:
        GKDConfigError: Arguments that have no meaning here, or not together.
        GKDTeacherError: No teacher, or one that can't do what the options ask.
    """
    refuse_trls_order(arguments["args"], arguments["data_collator"], name)
    # Trainers that take adapters (TRL's) also load a student by name; the plain Trainer does neither.
    base = Base.of(base_classes)
    is_plain_trainer = not base.is_trls
    config = completed_args(arguments["args"], is_plain_trainer, is_seq2seq=base.is_seq2seq)
    refuse_meaningless(config, arguments["compute_loss_func"], peft_config)
    config, prepares_rows = _for_rows(config, arguments, base)
    model = _given_student(arguments["model"], arguments["model_init"])
    if isinstance(model, nn.Module):  # as early as it can be known
        refuse_for_kind(model, config, base)
    trusts = getattr(config, "trust_remote_code", False)
    teacher = build_teacher(config, teacher=teacher, teacher_model=teacher_model, trust_remote_code=trusts)
    _refuse_teacher(teacher, model, config)
    leave_gpus_to(teacher, config)
    run = Run(
        config,
        has_top_tokens=teacher.top_k is not None,
        has_only_cache=any(isinstance(each, CachedTeacher) and each.fallback is None for each in all_teachers(teacher)),
        loads_student=isinstance(model, str),
        builds_rollouts=builds_rollouts,
        has_eval_rows=arguments["eval_dataset"] is not None,
    )
    check_loss_temperature(run)
    check_tail(config.teacher_tail, teacher.top_k, "teacher_tail")
    check_cache(run)
    processing_class = arguments["processing_class"]
    if processing_class is None:
        source = model if isinstance(model, str) else name_of(model)
        processing_class = find_processing_class(source, trusts, getattr(config, "model_init_kwargs", None))
    pad_id = pad_token_id(processing_class)  # before the student is loaded: it refuses what can't be used
    images = ImageProcessing.of(processing_class)
    if images is not None:
        find_unused_parameters(config)
    if not torch.accelerator.is_available():  # else each loader warns that it pins no memory
        config.dataloader_pin_memory = False
    set_seed(config.seed)  # adapters are initialised at random
    adapter = peft_config if is_plain_trainer else None
    own = {"model": model, "args": config, "processing_class": processing_class}
    # Preparation takes out the padding that rows were tokenised with.
    can_not_pad = prepares_rows and not can_pad(arguments["data_collator"])
    if is_plain_trainer:
        if isinstance(model, str):
            model = load_student(model, getattr(config, "model_init_kwargs", None), trusts)
        if model is not None:
            own["model"] = adapted(model, adapter, checkpoints_activations(config))
        if arguments["data_collator"] is None:
            own["data_collator"] = default_collator(own["model"], pad_id)
        elif can_not_pad:
            own["data_collator"] = StackOthers(default_collator(own["model"], pad_id))
    else:
        own["peft_config"] = peft_config
        if can_not_pad:
            own["data_collator"] = None
    base_arguments = {**arguments, **own}
    del base_arguments["compute_loss_func"]
    accepted = accepted_by(init_parameters(base_classes), base_arguments, name)
    return Construction(accepted, teacher, adapter, prepares_rows, images, run, base)


def _for_rows(config: Any, arguments: Mapping[str, Any], base: Base) -> tuple[Any, bool]:
    """Return a configuration that fits who prepares the rows, and whether we do."""
    # These collators of TRL tokenise columns that no model's forward takes.
    collator = arguments["data_collator"]
    reads_messages = hasattr(collator, "messages_key") or isinstance(collator, DataCollatorForVisionLanguageModeling)
    dataset_kwargs = getattr(config, "dataset_kwargs", None) or {}
    prepares_rows = not (reads_messages or _leaves_rows(dataset_kwargs, arguments))
    if reads_messages:
        config = _changed(config, remove_unused_columns=False)
    if base.is_trls:
        # We prepare the rows: SFTTrainer would also train on the system's and user's tokens.
        config = _changed(config, dataset_kwargs={**dataset_kwargs, "skip_prepare_dataset": True})
    if prepares_rows and getattr(config, "assistant_only_loss", False):
        # Always on here; SFTTrainer would refuse templates in which only it can't find the assistant's turns.
        config = _changed(config, assistant_only_loss=False)
    return config, prepares_rows


def _leaves_rows(dataset_kwargs: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """Return whether skip_prepare_dataset is set, and the collator can read the rows as they are.

    TRL's GKDTrainer sets it for a collator that reads messages, also in the caller's configuration.
    """
    if not dataset_kwargs.get("skip_prepare_dataset", False):
        return False
    evaluated = arguments["eval_dataset"]
    given = [arguments["train_dataset"], *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
    if arguments["data_collator"] is not None or all(map(_may_have_tokens, given)):
        return True
    logger.warning(
        "dataset_kwargs={'skip_prepare_dataset': True} has no effect: the rows have no input_ids, and no data_collator "
        "was passed that makes them."
    )
    return False


def _may_have_tokens(dataset: Any) -> bool:
    """Return whether a dataset has, or may have, rows with `input_ids`; a stream is not read for this."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        columns = dataset.column_names
    else:
        columns = first_row(dataset) if isinstance(dataset, list) else None
    return columns is None or "input_ids" in columns


def default_collator(model: nn.Module | None, pad_id: int) -> Any:
    """Return the collator of a student's batches; None stands for one that `model_init` makes."""
    if model is not None and is_encoder_decoder(base_model(model)):
        return EncoderDecoderCollator(pad_id)
    return DataCollatorForLanguageModeling(pad_token_id=pad_id)


def adapted(model: nn.Module, adapter: PeftConfig | None, checkpoints_gradients: bool) -> nn.Module:
    """Return a student in its adapter, if any, and ready for gradient checkpointing if that is on."""
    if adapter is not None:
        model = wrap_in_adapter(model, adapter)
    if isinstance(model, PeftModel) and checkpoints_gradients:
        # Without this, no gradient passes a checkpointed layer whose inputs need none (transformers#42489).
        model.enable_input_require_grads()
    return model


def uncompiled_student(model: nn.Module) -> nn.Module:
    """Return a student without `torch.compile`."""
    return uncompiled(model, "student", " (torch_compile=True compiles it anyway)")


def _changed(config: Any, **values: object) -> Any:
    """Return a configuration with other values; the caller's may go to another trainer, and keeps its own."""
    config = copy.copy(config)
    vars(config).update(values)
    return config


def _given_student(model: Any, model_init: object) -> Any:
    """Return the student, or its name; None if `model_init` makes it."""
    if (model is None) == (model_init is None):
        raise GKDConfigError("expected one student: pass model (a model, a name or a path) or model_init")
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    return uncompiled_student(model) if isinstance(model, nn.Module) else model


def _refuse_teacher(teacher: Teacher, model: object, config: Any) -> None:
    if any(each.is_local and each.model is model and not each.shares_weights for each in all_teachers(teacher)):
        raise GKDTeacherError(
            "teacher and student are the same object, so freezing one would freeze the other: load the teacher "
            "separately"
        )
    if config.seq_kd and not teacher.can_generate:
        raise GKDTeacherError(
            "seq_kd=True makes the teacher generate, but this teacher can't: pass a causal LM in this process, without "
            "offload, as teacher_model, or set seq_kd=False"
        )


def refuse_trls_order(args: object, data_collator: object, name: str) -> None:
    """Raise GKDConfigError for `GKDTrainer(student, teacher, config)`: TRL's order of arguments, not Trainer's."""
    for position, argument, is_valid in (
        ("args, the second argument,", args, args is None or isinstance(args, TrainingArguments)),
        ("data_collator, the third argument,", data_collator, not isinstance(data_collator, TrainingArguments)),
    ):
        if not is_valid:
            expected = "a GKDConfig or TrainingArguments" if argument is args else "a data collator"
            raise GKDConfigError(
                f"{position} must be {expected}; got {type(argument).__name__}. The order is Trainer's; pass the "
                f"teacher by keyword: {name}(student, teacher_model=teacher, args=config, ...)"
            )


def init_parameters(classes: Sequence[type]) -> dict[str, Parameter]:
    """Return the parameters of the first class's `__init__`, and of the next classes' through its `**kwargs`."""
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
    """Return the arguments that a trainer's `__init__` takes; others are dropped if they were not set.

    Raises TypeError for one that was set but that the trainer does not take.
    """
    accepted = {}
    for key, value in arguments.items():
        if key in parameters:
            accepted[key] = value
        elif value is not None and value != (None, None):
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
    return accepted


def warn_of_unused(options: Sequence[tuple[str, str]], args: Any) -> None:
    """Warn of the options that were set but have no effect, each with what it needs."""
    if options:
        listed = "; ".join(f"{name}={redacted(getattr(args, name), name)!r} needs {need}" for name, need in options)
        logger.warning("These options have no effect in this run: %s.", listed)


def refuse_meaningless(args: Any, compute_loss_func: object, peft_config: PeftConfig | None) -> None:
    """Raise GKDConfigError for arguments of Trainer that distillation would have to ignore."""
    if compute_loss_func is not None:
        raise GKDConfigError(
            "compute_loss_func would replace the divergence: override compute_loss in a subclass instead"
        )
    if args.label_smoothing_factor != 0:
        raise GKDConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths labels, but the targets here are the "
            "teacher's distributions: set it to 0 (loss_temperature smooths both sides)"
        )
    refuse_prompt_learning(peft_config)


def leave_gpus_to(teacher: Teacher, args: Any) -> None:
    """Keep Trainer from copying the student to GPUs that are there for a teacher.

    Trainer does the same for a student that a device map spreads over several.
    """
    models = [each.model for each in all_teachers(teacher) if each.model is not None and not each.shares_weights]
    if args.n_gpu > 1 and any(accelerators_of(model) - {args.device} for model in models):
        args._n_gpu = 1


def refuse_data_parallel(args: Any) -> None:
    """Raise GKDConfigError if Trainer would copy the model to several GPUs in one process."""
    if args.n_gpu > 1:
        raise GKDConfigError(
            f"{args.n_gpu} GPUs are visible to this process, and Trainer would use nn.DataParallel: "
            "start one process per GPU with `accelerate launch`, set CUDA_VISIBLE_DEVICES to one GPU, or put a teacher "
            "in this process on the others by its device_map"
        )


def refuse_dropped_deepspeed(args: Any, is_deepspeed_enabled: bool) -> None:
    """Raise GKDConfigError if DeepSpeed was requested but Accelerate runs without it."""
    if args.deepspeed is not None and not is_deepspeed_enabled:
        raise GKDConfigError(
            "deepspeed is set, but Accelerate does not run it (use_cpu="
            f"{args.use_cpu}, ACCELERATE_USE_CPU={os.environ.get('ACCELERATE_USE_CPU')}): unset ACCELERATE_USE_CPU, "
            "which disables it, or leave deepspeed out. On a CPU it runs with use_cpu=True; if not here, set "
            "ACCELERATE_TORCH_DEVICE=cpu and ACCELERATE_USE_DEEPSPEED=true, make a PartialState(backend='gloo') first, "
            "and set accelerator_config={'use_configured_state': True}"
        )


def refuse_split_sequences(context_parallel: int, sequence_parallel: int) -> None:
    """Raise GKDConfigError if ranks share a sequence."""
    if context_parallel > 1 or sequence_parallel > 1:
        raise GKDConfigError(
            "context and sequence parallelism split a sequence over ranks, but the divergence can't find the next "
            "token on another rank: set cp_size and sp_size to 1"
        )


def refuse_split_models(model: nn.Module, tensor_parallel: int, args: Any) -> None:
    """Raise GKDConfigError if ranks share a model in a way that rollouts don't know of."""
    if not args.generates_anywhere:
        return
    if tensor_parallel > 1:
        raise GKDConfigError(
            "tensor parallelism gives several ranks the same samples, but each rank draws and completes its own: set "
            "tp_size to 1 (FSDP shards a model too), or lmbda=0, seq_kd=False and eval_on_policy=False"
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise GKDConfigError(
            "the student was sharded by from_pretrained(distributed_config=...), whose ranks must run the same "
            "forwards, but each rank completes its own prompts: load it whole and set fsdp in the options, or lmbda=0, "
            "seq_kd=False and eval_on_policy=False"
        )


def refuse_for_kind(model: nn.Module, args: Any, base: Base) -> None:
    """Raise GKDConfigError for options or a trainer that don't fit a student: an encoder-decoder, or a causal LM."""
    student = base_model(model)
    name = type(student).__name__
    if getattr(args, "predict_with_generate", False) and not (base.is_seq2seq and is_encoder_decoder(student)):
        raise GKDConfigError(
            f"predict_with_generate=True needs an encoder-decoder and `class MyS2S(GKDMixin, Seq2SeqTrainer)`; the "
            f"student is a {name}: leave it out (eval_on_policy=True measures the divergence on completions)"
        )
    if not is_encoder_decoder(student):
        return
    if base.is_trls:
        raise GKDConfigError(
            f"{name} is an encoder-decoder, but the trainers of TRL are for causal LMs: use GKDTrainer, or "
            "`class MyS2S(GKDMixin, Seq2SeqTrainer)`"
        )
    for option in ("packing", "padding_free", "eval_packing"):
        if getattr(args, option, False):
            raise GKDConfigError(
                f"{option}=True joins rows into one sequence, but {name} is an encoder-decoder, which reads and writes "
                f"one row each: set {option}=False"
            )


def refuse_student(model: nn.Module, teacher: Teacher, *, is_trained: bool) -> None:
    """Raise for a student that can't be distilled.

    Args:
        model: The student as Trainer has it.
        teacher: Its teacher.
        is_trained: Whether there is a training set.

    Raises:
        GKDConfigError: Its adapter adds virtual tokens, or it must be trained but is frozen, offloaded, or would get no
            gradients.
        GKDTeacherError: It shares weights with the teacher.
    """
    refuse_prompt_learning(model)
    if any(not each.shares_weights and _have_weights_in_common(each.model, model) for each in all_teachers(teacher)):
        raise GKDTeacherError(
            "the teacher shares weights with the student, so freezing the teacher froze the student too: load the "
            "teacher separately"
        )
    if is_trained:
        refuse_offloaded(model)
        refuse_frozen(model)
        refuse_packed_by_forwards(model)


def _have_weights_in_common(teacher: nn.Module | None, student: nn.Module) -> bool:
    if teacher is None:
        return False
    return not {*map(id, teacher.parameters())}.isdisjoint(map(id, student.parameters()))

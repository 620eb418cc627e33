"""The parts of a trainer, each fitted to the others before the first row is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gkd_trainer.data import ImageProcessing, TeacherRoute
from gkd_trainer.data.rendered_prompts import RenderedPrompts
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.decoders import is_encoder_decoder
from gkd_trainer.models.heads import vocabulary_size
from gkd_trainer.models.loading import base_model, media_tokens
from gkd_trainer.report.metrics import ONE_TEACHER, TeacherSums
from gkd_trainer.rollouts import RolloutEngine
from gkd_trainer.rollouts.build import (
    build_student_engine,
    build_teacher_engine,
    find_stop_ids,
    refuse_engine,
    sampled_vocabulary_size,
)
from gkd_trainer.teachers import AligningTeacher, RoutedTeachers, Teacher, all_teachers, several_in
from gkd_trainer.teachers.context import ContextTeacher, longest_context, template_tokenizer
from gkd_trainer.trainer.pairing import Pairing, fitted_into, pair, refuse_pad_token, require_same_kind, shorter_context
from gkd_trainer.trainer.preparation import Preparation, pad_token_id, tokenizer_of
from gkd_trainer.trainer.ranks import Ranks
from gkd_trainer.trainer.recovery import Recovery
from gkd_trainer.trainer.rollout_queue import RolloutQueue
from gkd_trainer.trainer.student_teachers import StudentTeachers
from gkd_trainer.trainer.windows import WindowLoader


@dataclass(frozen=True)
class Parts:
    """The parts of a trainer; `args` are its options, with a max_length that fits both models."""

    args: Any
    ranks: Ranks
    recovery: Recovery
    windows: WindowLoader
    pairing: Pairing
    queue: RolloutQueue
    preparation: Preparation
    teacher_sums: TeacherSums
    student_teachers: StudentTeachers


def build_parts(
    args: Any,
    model: nn.Module,
    teacher: Teacher,
    accelerator: Accelerator,
    *,
    processing_class: Any,
    rollouts: RolloutEngine | None,
    formatting_func: Callable[[Any], Any] | None,
    has_eval_rows: bool,
) -> Parts:
    """Prepare the teacher, pair it with the student, and build the engines that generate.

    Args:
        args: TrainingArguments with GKDArguments; copied if they change.
        model: The student, Trainer's `model`.
        teacher: The teacher, not prepared yet.
        accelerator: Trainer's.
        processing_class: The student's tokenizer, or a processor that holds one; None if there is none.
        rollouts: The student's engine; None to build one from the options.
        formatting_func: Turns a row into one of a known format, if given.
        has_eval_rows: Whether there is a dataset to evaluate on, whose rows may be prompts.

    Raises:
        GKDError: The two don't fit, or a server can't be used.
    """
    ranks, student, tokenizer = Ranks(accelerator), base_model(model), tokenizer_of(processing_class)
    student_teachers = StudentTeachers(teacher)
    student_teachers.attach(model, ranks)
    require_same_kind(student, teacher)
    pad_id = pad_token_id(processing_class)
    refuse_pad_token(pad_id, model, teacher)
    refuse_engine(rollouts, args, student, is_sharded=ranks.sharding is not None)
    shorter = shorter_context(model, teacher)
    args = fitted_into(shorter, args)
    teacher.prepare(args.device, tokenizer, args.max_length)
    pairing = pair(model, teacher, tokenizer, ranks, is_compiled=ranks.compiles_student)
    recovery = Recovery(ranks, restarts_without_memory=args.auto_find_batch_size, saves_only_model=args.save_only_model)
    stop_ids = find_stop_ids(student, tokenizer)
    media = media_tokens(student)
    ids: dict[str, Any] = {
        "stop_ids": stop_ids,
        "pad_token_id": pad_id,
        "vocab_size": sampled_vocabulary_size(pairing.vocab_size, None if tokenizer is None else tokenizer.get_vocab()),
        "never_sampled": media.ids,
    }
    if rollouts is None:
        rollouts = build_student_engine(
            args,
            model,
            may_generate=args.generates_anywhere or has_eval_rows,
            rank=ranks.index,
            is_sharded=ranks.sharding is not None,
            fsdp_version={"fsdp1": 1, "fsdp2": 2}.get(ranks.sharding or ""),
            # The same numerics as in the loss.
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            trust_remote_code=getattr(args, "trust_remote_code", False),
            **ids,
        )
    queue = RolloutQueue(
        rollouts,
        build_teacher_engine(args, teacher.model, **ids) if args.seq_kd and teacher.model is not None else None,
        args=args,
        ranks=ranks,
        recovery=recovery,
        pad_token_id=pad_id,
        media_tokens=media,
    )
    student_size = vocabulary_size(student)
    preparation = Preparation(
        args,
        tokenizer,
        stop_ids=frozenset(stop_ids),
        # Cross-entropy needs its labels among the tokens compared.
        vocab_size=pairing.vocab_size if args.ce_weight > 0 else min(student_size, teacher.vocab_size or student_size),
        formatting_func=formatting_func,
        shorter=shorter,
        has_ranks=ranks.size > 1,
        is_encoder_decoder=is_encoder_decoder(student),
        images=None if is_encoder_decoder(student) else ImageProcessing.of(processing_class),
        route=teacher_route(teacher, args),
        teacher_prompts=teacher_prompts(teacher, tokenizer, args, student),
    )
    several = several_in(teacher)
    teacher_sums = ONE_TEACHER if several is None else TeacherSums(several.names, several.is_routed)
    windows = WindowLoader(ranks)
    return Parts(args, ranks, recovery, windows, pairing, queue, preparation, teacher_sums, student_teachers)


def teacher_route(teacher: Teacher, args: Any) -> TeacherRoute | None:
    """Return how each row gets one of several teachers; None if all rows have the same.

    Raises GKDConfigError if the options join rows in one sequence.
    """
    routed = next((each for each in all_teachers(teacher) if isinstance(each, RoutedTeachers)), None)
    if routed is None:
        return None
    _refuse_joined_samples(args, "each sample has a teacher of its own")
    return TeacherRoute(routed.names, routed.column, routed.route)


def teacher_prompts(teacher: Teacher, tokenizer: Any, args: Any, student: nn.Module) -> TeacherPrompts:
    """Return how rows' prompts for the teacher become token ids: those of its tokenizer, if it reads other tokens.

    Raises GKDConfigError if the options then join rows in one sequence.
    """
    if isinstance(teacher, AligningTeacher):
        _refuse_joined_samples(args, "a teacher with another tokenizer reads each sample in tokens of its own")
        return TeacherPrompts(teacher.tokenizer, rendered=RenderedPrompts(teacher.tokenizer))
    limit = longest_context(teacher, args.max_length)
    return TeacherPrompts(
        template_tokenizer(teacher, tokenizer),
        limit,
        is_encoder_decoder(student),
        may_follow=any(isinstance(each, ContextTeacher) for each in all_teachers(teacher)),
    )


def _refuse_joined_samples(args: Any, reason: str) -> None:
    for name in ("packing", "padding_free", "eval_packing"):
        if getattr(args, name, False):
            raise GKDConfigError(f"{name}=True joins samples into one sequence, but {reason}: set {name}=False")

"""How a student is compared with its teacher: over which tokens, with which head, and in which context."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.decoders import is_encoder_decoder, start_token_id
from gkd_trainer.models.heads import (
    ROUNDED_LOGITS,
    Context,
    InseparableHead,
    SeparableHead,
    find_context,
    find_head,
    input_embeddings,
    output_embeddings,
    rounds_logits,
    vocabulary_size,
)
from gkd_trainer.models.loading import base_model
from gkd_trainer.teachers import AligningTeacher, Teacher, all_teachers, pad_tokens_of, shared_vocabulary_size
from gkd_trainer.teachers.base import CompositeTeacher
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)

Args = TypeVar("Args", bound=GKDArguments)

_TEACHER_TOLERANCE = 1e-3
"""How much the magnitude of a teacher's weight may differ between ranks, whose devices sum in different orders."""


@dataclass(frozen=True)
class Pairing:
    """How a student is compared with its teacher.

    Both predict over the first `vocab_size` tokens. `head` turns the student's hidden states into logits; it was found
    in `head_module`. `is_compiled` says that the student's forward is compiled.
    """

    vocab_size: int
    head: SeparableHead | InseparableHead
    head_module: nn.Module | None
    is_compiled: bool

    def with_student(self, model: nn.Module, ranks: Ranks) -> Pairing:
        """Return the pairing of the same teacher with this student; itself if the head is already known.

        FSDP keeps the modules, so the head need not be found again after it.
        """
        module = output_embeddings(base_model(model))
        if module is self.head_module:
            return self
        return replace(self, head=_find_head(model, ranks, self.is_compiled), head_module=module)


@dataclass(frozen=True)
class OwnedContext:
    """The shorter of the student's and teacher's contexts, and its owner: "student" or "teacher"."""

    owner: str
    context: Context


def pair(
    model: nn.Module,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase | None,
    ranks: Ranks,
    *,
    is_compiled: bool = False,
) -> Pairing:
    """Pair a student with a teacher that is already prepared.

    Args:
        model: The student, Trainer's `model`.
        teacher: The teacher.
        tokenizer: The student's tokenizer, if any.
        ranks: The ranks that train together; all must call this.
        is_compiled: Whether compilation will hide the student's head.

    Raises:
        GKDTeacherError: Their vocabularies differ, or the teacher differs between ranks.
    """
    for each in all_teachers(teacher):
        _require_equal_teachers(each, ranks)
    vocab_size = shared_vocabulary_size(
        vocabulary_size(base_model(model)),
        teacher.vocab_size,
        None if tokenizer is None else tokenizer.get_vocab(),
        teacher.vocabulary,
        pad_tokens=pad_tokens_of(tokenizer, teacher.tokenizer),
    )
    # Now, not in the first step, so that the log says at construction if full logits are needed.
    head = _find_head(model, ranks, is_compiled)
    return Pairing(vocab_size, head, output_embeddings(base_model(model)), is_compiled)


def require_same_kind(student: nn.Module, teacher: Teacher) -> None:
    """Raise GKDTeacherError if a teacher can't score the batches of a student.

    Both must be causal LMs, or encoder-decoders that start their labels with the same token.
    """
    is_encoding = is_encoder_decoder(student)
    name = type(student).__name__
    kinds = {True: "an encoder-decoder", False: "a causal LM"}
    for each in all_teachers(teacher):
        if is_encoding and isinstance(each, AligningTeacher):
            raise GKDTeacherError(
                f"the student ({name}) is an encoder-decoder, but a teacher with another tokenizer reads the rows of "
                "causal LMs: use a teacher with the student's tokenizer"
            )
        if isinstance(each, CompositeTeacher):
            continue
        if is_encoding and not each.scores_encoder_decoders:
            raise GKDTeacherError(
                f"the student ({name}) is an encoder-decoder, whose batches a {type(each).__name__} does not score: "
                "pass an encoder-decoder as teacher_model (an implementation of Teacher that can sets "
                "scores_encoder_decoders = True)"
            )
        if each.model is None:
            continue
        model = base_model(each.model)
        if is_encoder_decoder(model) != is_encoding:
            raise GKDTeacherError(
                f"the student ({name}) is {kinds[is_encoding]}, but the teacher ({type(model).__name__}) is "
                f"{kinds[not is_encoding]}, which predicts other positions: pass {kinds[is_encoding]} as the teacher"
            )
        if is_encoding and start_token_id(model) != start_token_id(student):
            raise GKDTeacherError(
                f"the teacher's decoder starts with token {start_token_id(model)}, the student's with token "
                f"{start_token_id(student)}, but both read the same inputs: set decoder_start_token_id in the "
                "student's config to the teacher's"
            )


def refuse_pad_token(pad_token_id: int, model: nn.Module, teacher: Teacher) -> None:
    """Raise GKDConfigError if a model has no embedding for the pad token.

    Also if nothing is padded with it: Trainer writes the id into the student's config, with which most models of
    transformers can't be loaded again.
    """
    teachers = list(all_teachers(teacher))
    if any(isinstance(each, AligningTeacher) for each in teachers):
        teachers = []  # it reads other tokens
    for owner, each in [("student", model), *(("teacher", each.model) for each in teachers)]:
        embeddings = None if each is None else input_embeddings(base_model(each))
        size = getattr(embeddings, "num_embeddings", None)
        if isinstance(size, int) and pad_token_id >= size:
            raise GKDConfigError(
                f"the tokenizer's pad token has id {pad_token_id}, but the {owner} has embeddings for {size} tokens: "
                "set tokenizer.pad_token = tokenizer.eos_token (padding is masked, so it needs no token of its own)"
            )


def shorter_context(model: nn.Module, teacher: Teacher) -> OwnedContext | None:
    """Return the shorter context of student and teacher; None if neither states one."""
    teachers = list(all_teachers(teacher))
    if any(isinstance(each, AligningTeacher) for each in teachers):
        teachers = []  # it reads other tokens, and cuts them to its own context
    models = [("student", base_model(model)), *(("teacher", each.model) for each in teachers)]
    contexts = [(name, find_context(model)) for name, model in models if model is not None]
    known = [OwnedContext(name, context) for name, context in contexts if context is not None]
    return min(known, key=lambda each: each.context.limit, default=None)


def fitted_into(shorter: OwnedContext | None, args: Args) -> Args:
    """Return options with a max_length that fits a context: a default that does not is shortened.

    The caller's options are not changed, since they may be used for a trainer of other models.

    Raises:
        GKDConfigError: A max_length other than the default is too long.
    """
    if shorter is None or args.max_length is None or args.max_length <= shorter.context.limit:
        return args
    owner, limit = shorter.owner, shorter.context.limit
    if args.max_length != GKDArguments.max_length:
        raise GKDConfigError(
            f"max_length={args.max_length} is more than the {owner}'s context, {limit} tokens: {shorter.context.remedy}"
        )
    logger.warning("max_length is %d, the %s's context, instead of its default of %d.", limit, owner, args.max_length)
    fitted = copy.copy(args)
    fitted.shorten(limit)
    return fitted


def _find_head(model: nn.Module, ranks: Ranks, is_compiled: bool) -> SeparableHead | InseparableHead:
    head = _found_head(model, ranks, is_compiled)
    if isinstance(head, InseparableHead):
        rounding = ROUNDED_LOGITS if _rounds_logits(model, ranks) else ""
        logger.warning("The student computes full logits, which takes more memory%s: %s.", rounding, head.reason)
    return head


def _found_head(model: nn.Module, ranks: Ranks, is_compiled: bool) -> SeparableHead | InseparableHead:
    student = base_model(model)
    if ranks.sharding == "zero3":
        return InseparableHead("its weights are sharded over ranks", output_embeddings(student))
    if is_compiled:
        return InseparableHead("its forward is compiled as a whole", output_embeddings(student))
    head = find_head(student, is_sharded=ranks.sharding is not None)
    # Under FSDP only the first rank may have loaded weights; on the others they are zero, for which any head fits.
    if ranks.any(isinstance(head, InseparableHead)) and isinstance(head, SeparableHead):
        return InseparableHead("another rank's head can't be split off", head.module)
    return head


def _rounds_logits(model: nn.Module, ranks: Ranks) -> bool:
    is_mixed = ranks.accelerator.mixed_precision != "no"
    # Both cast the weights themselves.
    is_cast = ranks.sharding is not None or ranks.accelerator.distributed_type == DistributedType.DEEPSPEED
    return (is_mixed and is_cast) or rounds_logits(base_model(model), is_autocast=is_mixed)


def _require_equal_teachers(teacher: Teacher, ranks: Ranks) -> None:
    if teacher.model is None or teacher.shares_weights:
        return
    if any(hasattr(weight, "ds_id") for weight in teacher.model.parameters()):
        raise GKDTeacherError(
            "every rank must have all of the teacher's weights, but from_pretrained sharded them, as it does under "
            "DeepSpeed ZeRO-3: pass the teacher by name, which loads all of it on every rank"
        )
    if ranks.size == 1:
        return
    weights = (each for each in teacher.model.parameters() if each.is_floating_point() and not each.is_meta)
    weight = next(weights, torch.ones(()))
    sizes = ranks.gather(weight.detach().float().abs().sum().to(ranks.accelerator.device))
    if (sizes - sizes[0]).abs().max() > _TEACHER_TOLERANCE * sizes[0]:
        raise GKDTeacherError(
            "the teacher's weights must be the same on every rank, but the magnitudes of its first weight differ: "
            f"{sizes.tolist()}. Under FSDP with cpu_ram_efficient_loading, from_pretrained only loads them on the "
            "first rank: pass the teacher by name, which loads it on every rank"
        )

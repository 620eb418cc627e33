"""How a student is compared with its teacher: over which tokens, by which head, and within which context."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.heads import (
    Context,
    InseparableHead,
    SeparableHead,
    find_context,
    find_head,
    output_embeddings,
    vocabulary_size,
)
from gkd_trainer.models.loading import base_model
from gkd_trainer.teachers import Teacher, shared_vocabulary_size
from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)

Args = TypeVar("Args", bound=GKDArguments)

_TEACHER_TOLERANCE = 1e-3
"""How much the magnitude of a teacher's weight may differ between ranks, by the order of summing on their devices."""


@dataclass(frozen=True)
class Pairing:
    """How a student is compared with its teacher.

    `vocab_size` is how many of the first tokens both predict over; `head` how the student's hidden states become
    logits, found in `head_module`. `is_compiled` says that the student's forward is compiled as a whole.
    """

    vocab_size: int
    head: SeparableHead | InseparableHead
    head_module: nn.Module | None
    is_compiled: bool

    def with_student(self, model: nn.Module, ranks: Ranks) -> Pairing:
        """Return the pairing of the same teacher with this student; itself, where its head is known already.

        FSDP leaves the modules as they are, so that nothing has to be found again after it.
        """
        module = output_embeddings(base_model(model))
        if module is self.head_module:
            return self
        return replace(self, head=_find_head(model, ranks, self.is_compiled), head_module=module)


@dataclass(frozen=True)
class OwnedContext:
    """The shorter of the contexts of student and teacher, and whose it is: "student" or "teacher"."""

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
    """Fit a student and a teacher that is prepared together.

    Args:
        model: The student as Trainer's `model` is.
        teacher: The teacher.
        tokenizer: The student's tokenizer, if any.
        ranks: The ranks that train together; all of them call this.
        is_compiled: Whether `torch_compile` will hide the student's head.

    Raises:
        GKDTeacherError: Their vocabularies differ, or the teacher isn't the same on every rank.
    """
    _require_equal_teachers(teacher, ranks)
    vocab_size = shared_vocabulary_size(
        vocabulary_size(base_model(model)),
        teacher.vocab_size,
        None if tokenizer is None else tokenizer.get_vocab(),
        teacher.vocabulary,
    )
    # At construction, and not in the first step, the log says where full logits are needed.
    head = _find_head(model, ranks, is_compiled)
    return Pairing(vocab_size, head, output_embeddings(base_model(model)), is_compiled)


def shorter_context(model: nn.Module, teacher: Teacher) -> OwnedContext | None:
    """Return the shorter context of student and teacher; None where neither states one."""
    models = {"student": base_model(model), "teacher": teacher.model}
    contexts = {name: find_context(model) for name, model in models.items() if model is not None}
    known = [OwnedContext(name, context) for name, context in contexts.items() if context is not None]
    return min(known, key=lambda each: each.context.limit, default=None)


def fitted_into(shorter: OwnedContext | None, args: Args) -> Args:
    """Return options whose max_length a context holds: shortened where that was left at its default.

    The caller's stay as they are, since they may go to a trainer of other models.

    Raises:
        GKDConfigError: Another max_length than the default is too long.
    """
    if shorter is None or args.max_length is None or args.max_length <= shorter.context.limit:
        return args
    owner, limit = shorter.owner, shorter.context.limit
    if args.max_length != GKDArguments.max_length:
        raise GKDConfigError(
            f"max_length={args.max_length} is more than the {owner}'s context, {limit} tokens: {shorter.context.remedy}"
        )
    logger.warning("max_length is %d, the %s's context, in place of its default of %d.", limit, owner, args.max_length)
    fitted = copy.copy(args)
    fitted.shorten(limit)
    return fitted


def _find_head(model: nn.Module, ranks: Ranks, is_compiled: bool) -> SeparableHead | InseparableHead:
    head = _found_head(model, ranks, is_compiled)
    if isinstance(head, InseparableHead):
        logger.warning("The student's full logits are built, which takes more memory: %s.", head.reason)
    return head


def _found_head(model: nn.Module, ranks: Ranks, is_compiled: bool) -> SeparableHead | InseparableHead:
    if ranks.sharding == "zero3":
        return InseparableHead("its weights are sharded over ranks")
    if is_compiled:
        return InseparableHead("its forward is compiled as a whole")
    head = find_head(base_model(model), is_sharded=ranks.sharding is not None)
    # Under FSDP the first rank alone may have loaded the weights, and the others zeros, which any head explains.
    if ranks.any(isinstance(head, InseparableHead)) and isinstance(head, SeparableHead):
        return InseparableHead("that of another rank can't be taken apart")
    return head


def _require_equal_teachers(teacher: Teacher, ranks: Ranks) -> None:
    if teacher.model is None or teacher.shares_weights:
        return
    if any(hasattr(weight, "ds_id") for weight in teacher.model.parameters()):
        raise GKDTeacherError(
            "the teacher's weights must be whole on every rank; from_pretrained cut them into parts, as it does "
            "while DeepSpeed ZeRO-3 is on: pass the teacher by its name, which loads it whole"
        )
    if ranks.size == 1:
        return
    weights = (each for each in teacher.model.parameters() if each.is_floating_point() and not each.is_meta)
    weight = next(weights, torch.ones(()))
    sizes = ranks.gather(weight.detach().float().abs().sum().to(ranks.accelerator.device))
    if (sizes - sizes[0]).abs().max() > _TEACHER_TOLERANCE * sizes[0]:
        raise GKDTeacherError(
            "the teacher's weights must be the same on every rank; the magnitudes of the first one's differ: "
            f"{sizes.tolist()}. Under FSDP with cpu_ram_efficient_loading, from_pretrained gives them to the first "
            "rank alone: pass the teacher by its name, which loads it on every rank"
        )

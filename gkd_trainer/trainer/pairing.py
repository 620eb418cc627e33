"""The part of the trainer that fits teacher and student together: their vocabularies, their heads, their ranks."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.heads import (
    Context,
    InseparableHead,
    SeparableHead,
    find_context,
    find_head,
    output_embeddings,
    vocabulary_rows,
)
from gkd_trainer.models.loading import base_model
from gkd_trainer.teachers import Teacher, shared_vocabulary_size
from gkd_trainer.trainer.rollout_queue import GenerationMixin

logger = logging.getLogger(__name__)

_TEACHER_TOLERANCE = 1e-3
"""How much the magnitude of a teacher's weight may differ between ranks, by the order of summing on their devices."""


class PairingMixin(GenerationMixin):
    """Finds out what teacher and student are compared over, and how each is taken apart."""

    _shortest_context: tuple[str, Context] | None = None
    _head_of: tuple[nn.Module | None, SeparableHead | InseparableHead] | None = None

    def _connect_teacher(self, teacher: Teacher) -> None:
        self.teacher = teacher
        tokenizer = self._tokenizer_or_none
        self._fit_into_contexts()
        self.teacher.prepare(self.args.device, tokenizer, self.args.max_length)
        self._require_equal_teachers()
        self._vocab_size = shared_vocabulary_size(
            vocabulary_rows(base_model(self.model)),
            self.teacher.vocab_size,
            None if tokenizer is None else tokenizer.get_vocab(),
            self.teacher.vocabulary,
        )
        self._student_head()  # tells at construction, not in the first step, where full logits are needed

    def _fit_into_contexts(self) -> None:
        """Take the shortest context for max_length where that was left at its default; refuse a longer one."""
        models = {"student": base_model(self.model), "teacher": self.teacher.model}
        contexts = {name: find_context(model) for name, model in models.items() if model is not None}
        known = [(context.limit, name, context) for name, context in contexts.items() if context is not None]
        if not known:
            return
        limit, owner, context = min(known, key=lambda each: each[0])
        self._shortest_context = owner, context
        max_length: int | None = self.args.max_length
        if max_length is None or max_length <= limit:
            return
        if max_length != GKDArguments.max_length:
            raise GKDConfigError(
                f"max_length={max_length} is more than the {owner}'s context, {limit} tokens: {context.remedy}"
            )
        logger.warning("max_length is %d, the %s's context, in place of its default of %d.", limit, owner, max_length)
        self.args = copy.copy(self.args)  # the caller's may go to a trainer of other models
        self.args.shorten(limit)

    def _require_equal_teachers(self) -> None:
        if self.teacher.model is None:
            return
        if any(hasattr(weight, "ds_id") for weight in self.teacher.model.parameters()):
            raise GKDTeacherError(
                "the teacher's weights must be whole on every rank; from_pretrained cut them into parts, as it does "
                "while DeepSpeed ZeRO-3 is on: pass the teacher by its name, which loads it whole"
            )
        if self.accelerator.num_processes == 1:
            return
        weights = (each for each in self.teacher.model.parameters() if each.is_floating_point() and not each.is_meta)
        weight = next(weights, torch.ones(()))
        sizes = self.accelerator.gather(weight.detach().float().abs().sum().to(self.args.device))
        if (sizes - sizes[0]).abs().max() > _TEACHER_TOLERANCE * sizes[0]:
            raise GKDTeacherError(
                "the teacher's weights must be the same on every rank; the magnitudes of the first one's differ: "
                f"{sizes.tolist()}. Under FSDP with cpu_ram_efficient_loading, from_pretrained gives them to the first "
                "rank alone: pass the teacher by its name, which loads it on every rank"
            )

    def _student_head(self) -> SeparableHead | InseparableHead:
        module = output_embeddings(base_model(self.model))
        # Found anew after model_init made another student, but not after FSDP, which leaves the modules as they are.
        if self._head_of is None or self._head_of[0] is not module:
            head = self._found_head()
            if isinstance(head, InseparableHead):
                logger.warning("The student's full logits are built, which takes more memory: %s.", head.reason)
            self._head_of = (module, head)
        return self._head_of[1]

    def _found_head(self) -> SeparableHead | InseparableHead:
        if self._is_sharded and not self.is_fsdp_enabled:
            return InseparableHead("its weights are sharded over ranks")
        if self.args.torch_compile:
            return InseparableHead("its forward is compiled as a whole")
        head = find_head(base_model(self.model), is_sharded=self.is_fsdp_enabled)
        # Under FSDP the first rank alone may have loaded the weights, and the others zeros, which any head explains.
        if self._is_anywhere(isinstance(head, InseparableHead)) and isinstance(head, SeparableHead):
            return InseparableHead("that of another rank can't be taken apart")
        return head

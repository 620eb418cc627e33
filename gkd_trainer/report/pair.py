"""A student and a teacher outside a trainer, ready to be compared on token sequences.

Shapes: B batch, L length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.models.decoders import is_encoder_decoder, with_decoder_inputs
from gkd_trainer.models.heads import (
    InseparableHead,
    SeparableHead,
    compare,
    find_context,
    find_head,
    vocabulary_size,
    without_router_logits,
)
from gkd_trainer.models.loading import base_model, find_tokenizer, load_student, name_of, refuse_mistral_common
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.rollouts.build import find_stop_ids, sampled_vocabulary_size
from gkd_trainer.signals import Signal, StudentSignal
from gkd_trainer.teachers import (
    AligningTeacher,
    FrozenTeacher,
    RoutedTeachers,
    StudentTeacher,
    Teacher,
    all_teachers,
    comparable,
    pad_tokens_of,
    shared_vocabulary_size,
)
from gkd_trainer.types import Completion, TokenBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A student and a prepared teacher, compared over the first `vocab_size` tokens.

    `limit` is the shorter of their contexts, in tokens; None if unknown. `head` is the student's.
    """

    student: nn.Module
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase | None
    head: SeparableHead | InseparableHead
    vocab_size: int
    limit: int | None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether both read the prompt with an encoder."""
        return is_encoder_decoder(base_model(self.student))

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end the student's completions."""
        return find_stop_ids(base_model(self.student), self.tokenizer)

    def batch(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, is_on_policy: bool) -> TokenBatch:
        """Return token ids with their labels as a batch on the student's device.

        Args:
            sequences: At least one; labels are as long as the ids, or for an encoder-decoder, those of the decoder.
            is_on_policy: Whether the student generated them.

        Raises GKDDataError for a sequence that is longer than the context of student or teacher.
        """
        device = next(self.student.parameters()).device
        longest = max(len(tokens) for each in sequences for tokens in each)
        if self.limit is not None and longest > self.limit:
            raise GKDDataError(
                f"expected at most {self.limit} tokens, the shorter context of student and teacher; got {longest}: "
                "shorten the prompt or the completion"
            )

        def padded(rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
            width = max(map(len, rows))
            return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows], device=device)

        ids, labels = zip(*sequences, strict=True)
        inputs: dict[str, Any] = {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORE_INDEX),
            IS_ON_POLICY: torch.full((len(ids),), is_on_policy, device=device),
        }
        inputs = comparable(self.teacher, with_decoder_inputs(base_model(self.student), inputs))
        return TokenBatch.from_inputs(inputs)

    def compare(self, batch: TokenBatch, comparison: Callable[[StudentSignal, Signal], T]) -> T:
        """Return `comparison` of both models' predictions for a batch, without gradients."""
        with torch.no_grad(), evaluating(self.student):
            attach(self.teacher, self.student, self.head)
            teacher = self.teacher.score(batch).sliced(self.vocab_size)
            result, _ = compare(
                self.student,
                batch,
                self.head,
                lambda student: comparison(student.sliced(self.vocab_size), teacher),
                **without_router_logits(base_model(self.student)),
            )
        return result

    def completed(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        """Return the student's greedy completion of each prompt."""
        vocabulary = None if self.tokenizer is None else self.tokenizer.get_vocab()
        vocab_size = sampled_vocabulary_size(self.vocab_size, vocabulary)
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        engine = HFRollouts(self.stop_ids, 0 if pad_id is None else pad_id, vocab_size)
        engine.sync(self.student)
        with evaluating(self.student):
            return engine.generate(prompts, engine.greedy_sampling(max_new_tokens), [0] * len(prompts))


def pair(
    student: nn.Module | str | os.PathLike[str],
    teacher: Teacher | nn.Module | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Pair:
    """Return a student and a teacher that were checked to fit one another.

    Args:
        student: The model, or its name or folder, which is loaded in float32.
        teacher: A Teacher, a model, or its name or folder.
        tokenizer: The student's; by default the one stored with it.

    Raises:
        GKDConfigError: The student can't be loaded, or its tokenizer can't be used.
        GKDTeacherError: The teacher can't be loaded, does not fit the student, or is several of which each row has one.
    """
    refuse_mistral_common(tokenizer)
    if isinstance(student, str | os.PathLike):
        student = load_student(os.fspath(student), None, False)
    tokenizer = tokenizer or find_tokenizer(name_of(base_model(student)), False)
    prepared = as_teacher(teacher)
    for each in all_teachers(prepared):
        if isinstance(each, RoutedTeachers):
            raise GKDTeacherError(
                "RoutedTeachers has a teacher for each row of a dataset: pass one of them, from its `teachers` "
                f"({', '.join(each.names)})"
            )
        model = None if each.model is None else base_model(each.model)
        if model is not None and is_encoder_decoder(model) != is_encoder_decoder(base_model(student)):
            raise GKDTeacherError(
                f"expected two causal LMs or two encoder-decoders; got {type(base_model(student)).__name__} as the "
                f"student and {type(model).__name__} as the teacher"
            )
    teachers = list(all_teachers(prepared))
    if any(isinstance(each, AligningTeacher) for each in teachers):
        teachers = []  # it reads other tokens, and cuts them to its own context
    models = [base_model(student), *(each.model for each in teachers if each.model is not None)]
    contexts = [find_context(model) for model in models]
    limit = min((context.limit for context in contexts if context is not None), default=None)
    attach(prepared, student)
    prepared.prepare(next(student.parameters()).device, tokenizer, limit)
    vocab_size = shared_vocabulary_size(
        vocabulary_size(base_model(student)),
        prepared.vocab_size,
        None if tokenizer is None else tokenizer.get_vocab(),
        prepared.vocabulary,
        pad_tokens=pad_tokens_of(tokenizer, prepared.tokenizer),
    )
    return Pair(student, prepared, tokenizer, find_head(base_model(student)), vocab_size, limit)


def as_teacher(teacher: Teacher | nn.Module | str | os.PathLike[str]) -> Teacher:
    """Return a Teacher, or one of a model or of its name or folder."""
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, str | os.PathLike):
        return FrozenTeacher.from_pretrained(teacher)
    return FrozenTeacher(teacher)


def attach(teacher: Teacher, student: nn.Module, head: SeparableHead | InseparableHead | None = None) -> None:
    """Give the student to a teacher that runs it."""
    for each in all_teachers(teacher):
        if isinstance(each, StudentTeacher):
            each.attach(student, head)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

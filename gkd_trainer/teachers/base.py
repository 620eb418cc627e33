"""The contract of a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.heads import InseparableHead, SeparableHead
from gkd_trainer.signals import Signal, plain_signals, tensors_of
from gkd_trainer.teachers.prompt_scores import Witness
from gkd_trainer.types import TokenBatch


class Teacher(ABC):
    """A source of next-token distributions that the student imitates. It is never trained."""

    @abstractmethod
    def score(self, batch: TokenBatch) -> Signal:
        """Return the predictions at the batch's scored positions, in order, without gradients.

        The tensors are not those of `torch.inference_mode()`, which can't be saved for the student's backward.

        There may be no positions and, among several teachers, no samples; what ranks do together must still be done.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """How many tokens the teacher predicts over, including those that pad its head; None if unknown."""

    @property
    @abstractmethod
    def top_k(self) -> int | None:
        """How many tokens of each distribution it gives, at temperature 1; None for full distributions."""

    @property
    @abstractmethod
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the teacher's tokenizer; None if its tokenizer is unknown."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel | None:
        """The teacher's model if it is in this process, else None; `seq_kd` generates with it."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether it computes in this process; a remote teacher may fail for only one rank."""

    @property
    @abstractmethod
    def can_generate(self) -> bool:
        """Whether its `model` can complete prompts with transformers' `generate`, as `seq_kd` needs."""

    shares_weights: ClassVar[bool] = False
    """Whether it uses the student's own weights, so that freezing them would freeze the student."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """Its tokenizer if that is in this process; its chat template renders the teacher's own prompts."""

    witness: Witness | None = None
    """Its scores of a fixed text, if its weights are not in this process; known after `prepare`."""

    longest_sequence: int | None = None
    """How many tokens of a sequence it scores, if its `model` does not say; known after `prepare`."""

    scores_encoder_decoders: ClassVar[bool] = False
    """Whether it can score the batches of encoder-decoders, whose labels are not shifted (see TokenBatch)."""

    @abstractmethod
    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Get ready to score batches on `device`; called once, before training.

        Args:
            device: The device of the batches.
            tokenizer: The student's, to check a teacher whose tokenizer is not in this process.
            max_length: The longest sequence to expect, in tokens; a teacher with a shorter limit must refuse it here.
                None if unknown.
        """


class StudentTeacher(Teacher):
    """A teacher that runs the student's own model, and so needs the student before all else."""

    shares_weights = True

    @abstractmethod
    def attach(self, student: nn.Module, head: SeparableHead | InseparableHead | None = None) -> None:
        """Take the student to run: called before `prepare`, and again before each batch.

        Args:
            student: Trainer's `model`, not wrapped by DDP or DeepSpeed.
            head: The student's head; None before it is known, when nothing is scored yet.

        Raises:
            GKDTeacherError: The teacher can't be made of this student.
        """

    @property
    @abstractmethod
    def student(self) -> nn.Module:
        """The student that was attached last."""

    @abstractmethod
    def update(self) -> None:
        """Follow the student after an optimizer step that changed its weights; all ranks call it together."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Return the tensors from which `load_state` continues bit for bit, equal on all ranks; all call together."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the `state` of a checkpoint, or from the student's current weights if it is empty."""


class CompositeTeacher(Teacher):
    """A teacher that asks other teachers."""

    @property
    @abstractmethod
    def teachers(self) -> Sequence[Teacher]:
        """The teachers that it asks, in their order."""


class AligningTeacher(CompositeTeacher):
    """A teacher that reads samples in its own tokens, and is compared at only some of the student's positions."""

    @abstractmethod
    def comparable(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a collated batch with what this teacher reads, and only the labels of tokens that it can score.

        It must come before the tokens trained on are counted, and after completions were put into the batch; `score`
        needs it. A batch that it returned is returned unchanged.
        """

    tokenizer: PreTrainedTokenizerBase
    """The teacher's tokenizer, whose chat template renders all of its prompts (TEACHER_PROMPT_IDS)."""


def comparable(teacher: Teacher, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a collated batch as a teacher can score it: see `AligningTeacher.comparable`; unchanged for others."""
    return teacher.comparable(inputs) if isinstance(teacher, AligningTeacher) else inputs


def refuse_inference_tensors(signal: Signal, teacher: Teacher) -> None:
    """Raise GKDTeacherError if a teacher's predictions can't be saved for the student's backward."""
    tensors = (tensor for plain in plain_signals(signal) for tensor in tensors_of(plain))
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors):
        raise GKDTeacherError(
            f"{type(teacher).__name__}.score returned tensors of torch.inference_mode(), which autograd can't save for "
            "the student's backward: load the teacher's model and score under torch.no_grad() instead"
        )


def all_teachers(teacher: Teacher) -> Iterator[Teacher]:
    """Yield a teacher and all those inside it."""
    yield teacher
    if isinstance(teacher, CompositeTeacher):
        for inner in teacher.teachers:
            yield from all_teachers(inner)

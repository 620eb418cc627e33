"""The contract of a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.types import Signal, TokenBatch


class Teacher(ABC):
    """A source of next-token distributions that the student imitates. It is never trained."""

    @abstractmethod
    def score(self, batch: TokenBatch) -> Signal:
        """Return the predictions for the positions where the batch is scored, in its order, without gradients."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """How many tokens the teacher predicts over, padding rows included; None where it is unknown."""

    @property
    @abstractmethod
    def top_k(self) -> int | None:
        """How many tokens of each distribution it gives, at temperature 1; None for whole distributions."""

    @property
    @abstractmethod
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the teacher's tokenizer; None where its tokenizer is not known."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel | None:
        """The teacher's model if it lives in this process, else None."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether it computes in this process; one elsewhere may fail for one rank alone."""

    @property
    @abstractmethod
    def can_generate(self) -> bool:
        """Whether its `model` can complete prompts, as `seq_kd` needs, by transformers' `generate`."""

    shares_weights: ClassVar[bool] = False
    """Whether its weights are the student's own, so that freezing them would freeze the student."""

    @abstractmethod
    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Make ready to score batches that lie on `device`; called once, before training.

        Args:
            device: Where the batches lie.
            tokenizer: The student's: a teacher that can't be asked for its own is checked against it.
            max_length: The longest sequence to come, in tokens, which a teacher with a shorter limit refuses here; None
                where it is unknown.
        """

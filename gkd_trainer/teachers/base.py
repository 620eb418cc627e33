"""The contract of a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

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
        """How many tokens the teacher predicts over, padding rows included; None where nothing tells."""

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
        """The teacher's model where it lives in this process; `seq_kd` generates with it."""

    @abstractmethod
    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Make ready to score batches that lie on `device`; called once, before training.

        `tokenizer` is the student's, against which a teacher is checked that can't be asked for its own; `max_length`
        the longest sequence to come, in tokens, which a teacher with a limit refuses here; None is unknown.
        """

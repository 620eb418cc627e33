"""The contract of a rollout engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from torch import nn

from gkd_trainer.types import Completion, PromptMedia, Sampling


class RolloutEngine(ABC):
    """Turns prompts into completions of a model. It knows no data format and no loss."""

    takes_media: bool = False
    """Whether `generate` takes `media`. An engine without it never gets any, and needs no such parameter: prompts
    with images are refused when they are planned."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[Completion]:
        """Return one completion per prompt, in order.

        Args:
            prompts: Token ids, without padding.
            sampling: How tokens are drawn.
            seeds: One per prompt. A completion depends only on its own seed: neither the other prompts of the call nor
                the global RNG change it, and the global RNG is left as it was.
            media: The images of each prompt, None for a prompt without any; None if no prompt has any.
        """

    @abstractmethod
    def sync(self, model: nn.Module) -> None:
        """Make the next `generate` use the current weights of `model`, including active PEFT adapters."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine's resources; it is not used afterwards."""

    @final
    def greedy_sampling(self, max_new_tokens: int) -> Sampling:
        """Return the sampling that always takes the most probable token."""
        return Sampling(max_new_tokens, temperature=0.0)

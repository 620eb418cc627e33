"""What differs between the supported versions of transformers and TRL: the one place that asks which is there."""

from __future__ import annotations

from typing import Any

DEFAULT_LOSSES = (None, "nll", "chunked_nll")
"""Ways to compute the default loss of trl.SFTTrainer; None is its default until the configuration is built."""


def mark_loss_as_scaled(trainer: Any) -> None:
    """Have Trainer leave the loss undivided, as `trainer.loss_is_scaled_for_ga` says.

    Trainer reads that attribute from transformers 5.19. The ones before divide the loss by the micro-batches of the
    window unless they believe that the model has divided it, by the count of tokens that it was passed.
    """
    from transformers import Trainer  # not above: the configuration needs none of what it imports

    if not hasattr(Trainer, "loss_is_scaled_for_ga") and trainer.loss_is_scaled_for_ga:
        trainer.model_accepts_loss_kwargs = True


def checkpoints_activations(args: Any) -> bool:
    """Return whether activations are computed again in the backward pass; the option changed its name in 5.23."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))

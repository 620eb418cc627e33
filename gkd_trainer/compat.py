"""What differs between the supported versions of transformers and TRL: the one place that asks which is there."""

from __future__ import annotations

from typing import Any

DEFAULT_LOSSES = (None, "nll", "chunked_nll")
"""Ways to compute the default loss of trl.SFTTrainer; None is its default until the configuration is built."""


def mark_loss_as_scaled(trainer: Any) -> None:
    """Have Trainer leave the loss undivided, as `trainer.loss_is_scaled_for_ga` says.

    Trainer reads that attribute from transformers 5.19. The ones before divide the loss by the micro-batches of the
    window unless they believe that the model has divided it, by the count of tokens that it was passed. Those from 5.2
    to 5.5 have Accelerate divide it too, in the backward pass: the log is right there and the gradients are not.
    """
    from transformers import Trainer  # here, since the options need this module, and not all that Trainer imports

    if not hasattr(Trainer, "loss_is_scaled_for_ga") and trainer.loss_is_scaled_for_ga:
        trainer.model_accepts_loss_kwargs = True
        trainer.accelerator.gradient_accumulation_steps = 1


def checkpoints_activations(args: Any) -> bool:
    """Return whether activations are computed again in the backward pass; the option changed its name in 5.23."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))

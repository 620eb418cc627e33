"""Differences between the supported versions of transformers and TRL; no other module checks which is installed."""

from __future__ import annotations

from typing import Any

DEFAULT_LOSSES = (None, "nll", "chunked_nll")
"""Ways to compute the default loss of trl.SFTTrainer; None is its default until the configuration is built."""


def mark_loss_as_scaled(trainer: Any) -> None:
    """Keep Trainer from dividing the loss, as `trainer.loss_is_scaled_for_ga` asks.

    Trainer reads that attribute from transformers 5.19 on. Earlier versions divide the loss by the number of
    micro-batches in the window unless they believe that the model has divided it by the token count it was passed. In
    5.2 to 5.5 Accelerate also divides it, in the backward pass: there the log would be right and the gradients wrong.
    """
    from transformers import Trainer  # here: the options need this module, but not everything that Trainer imports

    if not hasattr(Trainer, "loss_is_scaled_for_ga") and trainer.loss_is_scaled_for_ga:
        trainer.model_accepts_loss_kwargs = True
        trainer.accelerator.gradient_accumulation_steps = 1


def find_unused_parameters(args: Any) -> None:
    """Have DDP look for weights without gradients, such as the image encoder's on a rank without images.

    Trainer does not do so if activations are recomputed. Reentrant checkpointing can't be combined with it.
    """
    options = (getattr(args, f"{kind}_checkpointing_kwargs", None) for kind in ("activation", "gradient"))
    is_reentrant = any((each or {}).get("use_reentrant") for each in options)
    if args.ddp_find_unused_parameters is None and not is_reentrant:
        args.ddp_find_unused_parameters = True


def checkpoints_activations(args: Any) -> bool:
    """Return whether activations are recomputed in the backward pass; the option was renamed in transformers 5.23."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def without_mistral_common() -> dict[str, bool]:
    """Return the options with which AutoTokenizer does not load a tokenizer of mistral-common.

    Where that package is installed (vLLM needs it), transformers takes it for any folder with a tekken.json. Versions
    before the option do so only if there is no tokenizer_config.json.
    """
    from transformers.models.auto import tokenization_auto

    return {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}

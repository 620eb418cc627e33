"""The trainer that the mixins of this package stand in front of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from gkd_trainer.errors import GKDDataError

if TYPE_CHECKING:

    class AnyTrainer(Trainer):
        """Any trainer that derives from Trainer, with the options of distillation in `args`."""

        args: Any
        model: Any
        train_dataset: Any
        eval_dataset: Any
        _signature_columns: Any
else:
    AnyTrainer = object


def pad_token_id(processing_class: Any) -> int:
    """Return the id that fills batches: the pad token, or eos, or 0. It is masked wherever it stands."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return int(token_id)
    return 0


def require_labels(inputs: Mapping[str, Any]) -> None:
    """Raise GKDDataError where a collated batch has no labels."""
    if "labels" not in inputs or inputs["labels"] is None:
        raise GKDDataError(
            f"the data collator gave no labels, only {', '.join(sorted(inputs))}: return labels [B, L] with the token "
            "ids and -100 where a token is not trained on, or leave data_collator out"
        )

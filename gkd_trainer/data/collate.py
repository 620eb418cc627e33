"""Collators of transformers that know no labels of their own, made to keep those of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from gkd_trainer.batch import IGNORE_INDEX

Collator = Callable[[list[Any]], dict[str, Any]]


class KeepLabels:
    """Pads rows with a collator of transformers, and puts their labels where their tokens came to stand.

    DataCollatorWithPadding can't pad labels, and DataCollatorForLanguageModeling would replace them by all tokens.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collated batch with labels [B, L]; padding may be on either side."""
        batch = self.collator([{key: value for key, value in row.items() if key != "labels"} for row in rows])
        labels_BL = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels = [label for row in rows for label in row.get("labels", row["input_ids"])]
        labels_BL[batch["attention_mask"].bool()] = torch.as_tensor(labels)
        batch["labels"] = labels_BL
        return batch


def keeping_labels(collator: Collator) -> Collator:
    """Return the collator, wrapped where it is one of transformers that would lose the labels."""
    loses_labels = isinstance(collator, DataCollatorWithPadding) or (
        isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm
    )
    return KeepLabels(collator) if loses_labels else collator

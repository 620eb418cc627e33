"""Wrappers of collators that keep what the collators would drop: the rows' labels and side tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from gkd_trainer.batch_keys import IGNORE_INDEX, SIDE_TENSORS, SideTensor
from gkd_trainer.data.keys import checked_key

Collator = Callable[[list[Any]], dict[str, Any]]


class Wrapper:
    """A collator around another, which passes attributes through to it."""

    collator: Collator

    def __init__(self, collator: Collator) -> None:
        vars(self)["collator"] = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collator, name, value)


class KeepLabels(Wrapper):
    """Pads rows with a collator of transformers, and aligns their labels with their tokens.

    DataCollatorWithPadding can't pad labels, and DataCollatorForLanguageModeling would label all tokens.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collated batch with labels [B, L]; padding may be on either side."""
        batch = self.collator([{key: value for key, value in row.items() if key != "labels"} for row in rows])
        labels_BL = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels = [label for row in rows for label in row.get("labels", row["input_ids"])]
        labels_BL[batch["attention_mask"].bool()] = torch.as_tensor(labels)
        batch["labels"] = labels_BL
        return batch


class KeepSideTensors(Wrapper):
    """Collates rows with any collator, and adds to the batch the SIDE_TENSORS that the rows have as columns.

    If a collator makes its own samples, with other tokens than the rows have, the batch gets none: prompts are then the
    tokens before the last trained run, and no key tells which rows a sample comes from.
    """

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the collated batch, with each side tensor for which any row has a value.

        Raises:
            GKDDataError: A row's value of a side tensor is not an integer.

        """
        if not all(isinstance(row, Mapping) for row in rows):
            return self.collator(rows)
        names = {name for name, side in SIDE_TENSORS.items() if side.is_column and any(name in row for row in rows)}
        if not names:
            return self.collator(rows)
        batch = self.collator([{key: value for key, value in row.items() if key not in names} for row in rows])
        tensors = {name: _side_tensor(SIDE_TENSORS[name], [row.get(name) for row in rows]) for name in sorted(names)}
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return {**batch, **found} if found and _has_tokens_of(batch, rows) else batch


@dataclass
class EncoderDecoderCollator:
    """Pads rows on the right: `input_ids` with `pad_token_id`, and `labels`, of another length, with IGNORE_INDEX."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` [B, L] and `labels`, of a length of their own, of at least 1."""
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row.get("labels", []), dtype=torch.long) for row in rows]
        # No label stands for a prompt, but a decoder needs one position.
        labels = [label_L if len(label_L) else torch.tensor([IGNORE_INDEX]) for label_L in labels]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids_L) for ids_L in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }


def unwrapped(collator: Any) -> Any:
    """Return the collator inside the wrappers that keep labels and side tensors."""
    while isinstance(collator, Wrapper):
        collator = collator.collator
    return collator


def keeping_labels(collator: Collator) -> Collator:
    """Return the collator, wrapped if it is one of transformers that would lose the labels."""
    loses_labels = isinstance(collator, DataCollatorWithPadding) or (
        isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm
    )
    return KeepLabels(collator) if loses_labels else collator


def _side_tensor(side: SideTensor, values: list[Any]) -> torch.Tensor | None:
    """Return the rows' values as a tensor [B] or [B, P], or None if no row has one."""
    if side.is_list:
        lists = [torch.as_tensor([] if value is None else value, dtype=torch.long) for value in values]
        has_any = any(map(len, lists))
        return pad_sequence(lists, batch_first=True, padding_value=side.filling) if has_any else None
    if all(value is None for value in values):
        return None
    checked = [
        side.filling if value is None else checked_key(value, f"row {row} of a batch", side.name)
        for row, value in enumerate(values)
    ]
    return torch.tensor(checked)


def _has_tokens_of(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a batch's samples are the rows, in order; they may be cut at the end."""
    ids_BL = batch.get("input_ids")
    if not isinstance(ids_BL, torch.Tensor) or len(ids_BL) != len(rows):
        return False
    mask_BL = batch.get("attention_mask")
    if not isinstance(mask_BL, torch.Tensor) or mask_BL.shape != ids_BL.shape:
        mask_BL = torch.ones_like(ids_BL)
    for ids_L, mask_L, row in zip(ids_BL, mask_BL, rows, strict=True):
        sample, expected = ids_L[mask_L.bool()].tolist(), torch.as_tensor(row["input_ids"]).tolist()
        # Without a mask, padding is at the end.
        if not sample or sample[: len(expected)] != expected[: len(sample)]:
            return False
    return True

"""Wrappers of collators that keep what the collators would drop: the rows' values per token and side tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from gkd_trainer.batch_keys import IGNORE_INDEX, PER_TOKEN, SIDE_TENSORS, TEACHER_PROMPT_IDS, SideTensor
from gkd_trainer.data.keys import checked_key
from gkd_trainer.data.pairs import held_pair
from gkd_trainer.data.tokens import SEQ_LENGTHS, RowDropped, RowTokens, held_tokens
from gkd_trainer.errors import GKDDataError
from gkd_trainer.right_padding import right_padded

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


class KeepTokenValues(Wrapper):
    """Pads rows with a collator of transformers or TRL, and aligns their labels and other values with their tokens.

    DataCollatorWithPadding can't pad labels, DataCollatorForLanguageModeling would label all tokens, and TRL's reads
    only tokens and labels. None of them knows `completion_mask`, or takes a row's own padding out.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collated batch with labels [B, L]; padding may be on either side.

        Rows whose `position_ids` start again hold several samples. Models tell these apart only without an
        `attention_mask`, so their batch has none, and is padded on the right.

        Raises:
            GKDDataError: A row's columns don't fit its tokens, or the collator changes those.

        """
        tokens = [read_row(held_tokens, row, f"row {index} of a batch") for index, row in enumerate(rows)]
        batch = self.collator([self._to_pad(row, own) for row, own in zip(rows, tokens, strict=True)])
        is_packed = any(map(holds_several_samples, tokens))
        if getattr(self.collator, "padding_free", False):
            # TRL's collator reads seq_lengths itself.
            if is_packed and not all(SEQ_LENGTHS in row for row in rows):
                raise GKDDataError(
                    "padding_free=True numbers each row's tokens from 0, but the position_ids of these rows start "
                    "again: give one sample per row, or set padding_free=False"
                )
            return batch
        if "attention_mask" not in batch:
            raise GKDDataError(
                f"{type(self.collator).__name__} returned no attention_mask, which shows the rows' tokens: make "
                "it return one"
            )
        mask_BL = batch["attention_mask"].bool()
        if not self._has_own_labels(batch):
            batch["labels"] = _aligned(mask_BL, [_trained(own) for own in tokens], IGNORE_INDEX)
        for name in sorted(_CARRIED):
            if any(name in own.per_token for own in tokens):
                batch[name] = _aligned(mask_BL, [own.per_token.get(name, _usual(name, own)) for own in tokens], 0)
        if is_packed:
            batch = right_padded(batch)
            del batch["attention_mask"]
        return batch

    def _to_pad(self, row: Mapping[str, Any], tokens: RowTokens) -> dict[str, Any]:
        is_trls = isinstance(self.collator, TRLCollator)
        others = {key: row[key] for key in row if key not in PER_TOKEN and (key != SEQ_LENGTHS or is_trls)}
        labels = {"labels": tokens.labels} if is_trls else {}
        return {**others, "input_ids": tokens.ids, "attention_mask": [1] * len(tokens.ids), **labels}

    def _has_own_labels(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a subclass of DataCollatorForLanguageModeling chose what is trained on."""
        if not isinstance(self.collator, DataCollatorForLanguageModeling) or "labels" not in batch:
            return False
        ids_BL, pad_id = batch["input_ids"], self.collator.tokenizer.pad_token_id
        all_BL = ids_BL if pad_id is None else ids_BL.masked_fill(ids_BL == pad_id, IGNORE_INDEX)
        return not torch.equal(batch["labels"], all_BL)


class KeepSideTensors(Wrapper):
    """Collates rows with any collator, and adds to the batch the SIDE_TENSORS that the rows have as columns.

    Trainer keeps the columns `label` and `label_ids`, and transformers' collators take them for the labels. From rows
    that have `labels`, as all prepared ones do, such a collator gets neither.

    If a collator makes its own samples, with other tokens than the rows have, the batch gets none: prompts are then the
    tokens before the last trained run, and no key tells which rows a sample comes from. Only a prompt of the teacher's
    own can't be left out: the teacher would read another.
    """

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the collated batch, with each side tensor for which any row has a value.

        Raises:
            GKDDataError: A row's value of a side tensor is not an integer, or the collator joins or changes rows with
                a prompt of the teacher's own.

        """
        if not all(isinstance(row, Mapping) for row in rows):
            return self.collator(rows)
        names = {name for name, side in SIDE_TENSORS.items() if side.is_column and any(name in row for row in rows)}
        left_out = names | (_NO_LABELS if self._is_misled and all("labels" in row for row in rows) else set())
        given = [{key: value for key, value in row.items() if key not in left_out} for row in rows]
        batch = self.collator(given if left_out else rows)
        if not names:
            return batch
        tensors = {name: _side_tensor(SIDE_TENSORS[name], [row.get(name) for row in rows]) for name in sorted(names)}
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if not found or _has_tokens_of(batch, rows):
            return {**batch, **found}
        if TEACHER_PROMPT_IDS in found and TEACHER_PROMPT_IDS not in batch:
            raise GKDDataError(
                "the teacher reads a prompt of its own for each row (a teacher_prompt, or the row in the tokens of "
                f"another tokenizer), but {type(unwrapped(self)).__name__} did not return the rows' tokens in order, "
                "one row per sample, cut at most at the end: make the data collator return them so, leave it out, or "
                "set padding_free=False"
            )
        return batch

    @property
    def _is_misled(self) -> bool:
        return type(unwrapped(self)).__module__.startswith("transformers.")


class StackOthers(Wrapper):
    """Collates rows' tokens with a collator that pads them, and other columns as transformers' default_data_collator.

    That one can't pad.
    """

    def __init__(self, collator: Collator) -> None:
        super().__init__(keeping_token_values(collator))

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the collated batch."""
        of_tokens = PER_TOKEN | _NO_LABELS | {SEQ_LENGTHS}
        others = [{key: row[key] for key in row if key not in of_tokens} for row in rows]
        return {**default_data_collator(others), **self.collator(rows)}


@dataclass
class EncoderDecoderCollator:
    """Pads rows on the right: `input_ids` with `pad_token_id`, and `labels`, of another length, with IGNORE_INDEX."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` [B, L] and `labels`, of a length of their own, of at least 1.

        Raises:
            GKDDataError: A row's columns are not those of an encoder-decoder, or don't fit its tokens.

        """
        pairs = [read_row(held_pair, row, f"row {index} of a batch") for index, row in enumerate(rows)]
        ids = [torch.tensor(pair.ids) for pair in pairs]
        labels = [torch.tensor(pair.labels, dtype=torch.long) for pair in pairs]
        # No label stands for a prompt, but a decoder needs one position.
        labels = [label_L if len(label_L) else torch.tensor([IGNORE_INDEX]) for label_L in labels]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids_L) for ids_L in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }


def can_pad(collator: Any) -> bool:
    """Return whether a collator may pad: False for transformers' default_data_collator, also as a class."""
    return collator is not default_data_collator and type(collator) is not DefaultDataCollator


def unwrapped(collator: Any) -> Any:
    """Return the collator inside the wrappers that keep values per token and side tensors."""
    while isinstance(collator, Wrapper):
        collator = collator.collator
    return collator


def keeping_token_values(collator: Collator) -> Collator:
    """Return the collator, wrapped if it is one of transformers or TRL that would lose labels or other columns.

    A class that collates in a way of its own makes its own labels. From DataCollatorForLanguageModeling, which can't
    pad labels, it inherits that its rows have none.
    """
    loses_labels = isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm
    if loses_labels or _collates_as(collator, DataCollatorWithPadding) or _collates_as(collator, TRLCollator):
        return KeepTokenValues(collator)
    return collator


def only_pads(collator: Any) -> bool:
    """Return whether a collator makes the same sample of a row whatever the other rows and chance: one that only pads.

    True for those of transformers and TRL, but for no class derived from them.
    """
    inner = unwrapped(collator)
    is_known = type(inner) in (DataCollatorForLanguageModeling, DataCollatorWithPadding, TRLCollator)
    return is_known and not getattr(inner, "mlm", False)  # mlm masks tokens by chance


def columns_read_by(collator: Any, forward: Callable[..., Any]) -> frozenset[str]:
    """Return the columns per token that one of our collators reads: the masks, and what a model's forward takes."""
    while isinstance(collator, Wrapper) and not isinstance(collator, KeepTokenValues):
        collator = collator.collator
    if not isinstance(collator, KeepTokenValues | EncoderDecoderCollator):
        return frozenset()
    taken = PER_TOKEN & signature(forward).parameters.keys()
    return _MASKS | taken | ({SEQ_LENGTHS} if "position_ids" in taken else set())


def read_row(read: Callable[[Mapping[str, Any]], RowTokens], row: Mapping[str, Any], name: str) -> RowTokens:
    """Return the tokens of a row, which may come from a dataset that is used as is; an error calls it `name`.

    Raises GKDDataError if `read` drops the row.
    """
    try:
        tokens = read(row)
        if not tokens.ids:
            raise RowDropped("no tokens")
    except RowDropped as dropped:
        raise GKDDataError(
            f"{name} can't be used: {dropped.reason}. Correct the dataset, or convert it with "
            "datasets.Dataset.from_list(list(rows)), which drops such rows"
        ) from dropped
    return tokens


def holds_several_samples(tokens: RowTokens) -> bool:
    """Return whether a row holds several samples: its `position_ids` start again."""
    return len(_joints(tokens)) > 0


_MASKS = frozenset({"attention_mask", "completion_mask", "assistant_masks"})
_NO_LABELS = frozenset({"label", "label_ids"})
_CARRIED = frozenset({"position_ids", "token_type_ids", "mm_token_type_ids"})


def _collates_as(collator: Collator, kind: type) -> bool:
    """Return whether a collator is of a class, and collates as that does."""
    overridable = ("__call__", "torch_call")
    return isinstance(collator, kind) and all(
        getattr(type(collator), name, None) is getattr(kind, name, None) for name in overridable
    )


def _aligned(mask_BL: torch.Tensor, rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
    """Return the rows' values at the tokens of a batch, and `filling` at its padding."""
    if mask_BL.sum(dim=1).tolist() != [len(values) for values in rows]:
        raise GKDDataError(
            f"rows of {[len(values) for values in rows]} tokens were collated to samples of "
            f"{mask_BL.sum(dim=1).tolist()}: make the data collator keep the rows' tokens, or return labels of its own"
        )
    values_BL = torch.full(mask_BL.shape, filling)
    values_BL[mask_BL] = torch.tensor([value for values in rows for value in values], dtype=torch.long)
    return values_BL


def _usual(name: str, tokens: RowTokens) -> Sequence[int]:
    """Return what a row without a column would have in it."""
    return range(len(tokens.ids)) if name == "position_ids" else [0] * len(tokens.ids)


def _joints(tokens: RowTokens) -> list[int]:
    """Return the indices of tokens before which a row's `position_ids` start again."""
    positions = tokens.per_token.get("position_ids", [])
    return [index for index in range(1, len(positions)) if positions[index] != positions[index - 1] + 1]


def _trained(tokens: RowTokens) -> list[int]:
    """Return a row's labels without those of the first tokens of samples, which nothing predicts."""
    labels = list(tokens.labels)
    for index in _joints(tokens):
        labels[index] = IGNORE_INDEX
    return labels


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
        own_L = torch.as_tensor(row["input_ids"])
        if row.get("attention_mask") is not None:
            own_L = own_L[torch.as_tensor(row["attention_mask"]).bool()]
        sample, expected = ids_L[mask_L.bool()].tolist(), own_L.tolist()
        # Without a mask, padding is at the end.
        if not sample or sample[: len(expected)] != expected[: len(sample)]:
            return False
    return True

"""The tokens of a row before they are cut, and reading them from a row that is already tokenised."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS

_PER_TOKEN_COLUMNS = (
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "position_ids",
    "completion_mask",
    "assistant_masks",
)
"""Columns of tokenised rows with one value per token."""

_TRAINED_MASKS = ("completion_mask", "assistant_masks")
"""Those that say which tokens are trained on in a row without `labels`."""

SEQ_LENGTHS = "seq_lengths"
"""The column in which `trl.pack_dataset` leaves how long each sample of a row is; it stands for `position_ids`."""

NEGATIVE_LABEL = f"a negative label other than {IGNORE_INDEX}, which marks tokens that are not trained on"


class RowDropped(Exception):  # noqa: N818 (a verdict on a row, which is counted; never seen by a caller)
    """A row can't be used: why, and the `max_length` that it would need (0: none would help)."""

    def __init__(self, reason: str, needed_length: int = 0) -> None:
        super().__init__(reason, needed_length)
        self.reason = reason
        self.needed_length = needed_length


@dataclass(frozen=True)
class RowTokens:
    """A row's tokens before they are cut to a length; an encoder-decoder's `labels` are not as long as its `ids`.

    `prompt_ids` are its on-policy prompt if that differs from the tokens before its last trained run, else empty.
    `per_token` holds its other columns with one value per token. `unended` names the token that ends its last turn
    instead of a stop token, or is empty. `is_open` says that a user or a tool has the last word: the prompt is then all
    of the conversation.
    """

    ids: list[int]
    labels: list[int]
    prompt_ids: list[int] = field(default_factory=list)
    per_token: dict[str, list[Any]] = field(default_factory=dict)
    unended: str = ""
    is_open: bool = False


def held_tokens(row: Mapping[str, Any]) -> RowTokens:
    """Return the tokens of a row's `input_ids`, without padding, with its other columns per token.

    `position_ids` are made from the `seq_lengths` of a row that TRL packed.

    Raises:
        RowDropped: A column is not a list of token ids, has a negative one, or does not fit the length of `input_ids`.

    """
    ids = id_list(row["input_ids"], "input_ids")
    per_token = {column: _plain(row[column]) for column in _PER_TOKEN_COLUMNS if row.get(column) is not None}
    if "position_ids" not in per_token and row.get(SEQ_LENGTHS) is not None:
        lengths = id_list(row[SEQ_LENGTHS], SEQ_LENGTHS)
        if sum(lengths) != len(ids):
            raise RowDropped(f"{SEQ_LENGTHS} don't add up to the length of input_ids")
        per_token["position_ids"] = [position for length in lengths for position in range(length)]
    for column, values in per_token.items():
        if len(values) != len(ids):
            raise RowDropped(f"{column} is not as long as input_ids")
    if row.get("labels") is not None:
        labels = id_list(row["labels"], "labels")
        if len(labels) != len(ids):
            raise RowDropped("labels are not as long as input_ids")
    else:
        masks = [per_token[column] for column in _TRAINED_MASKS if column in per_token]
        labels = [token_id if all(mask[i] for mask in masks) else IGNORE_INDEX for i, token_id in enumerate(ids)]
    # Padding is removed on either side: otherwise a prompt would be completed after its padding.
    kept = [i for i, attended in enumerate(per_token.get("attention_mask", [1] * len(ids))) if attended]
    if len(kept) < len(ids):
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept]
        per_token = {column: [values[i] for i in kept] for column, values in per_token.items()}
    # Rows of a dataset that is already prepared keep their prompts.
    prompt_ids = [] if row.get(PROMPT_IDS) is None else id_list(row[PROMPT_IDS], PROMPT_IDS)
    refuse_negative_ids(ids, "input_ids")
    refuse_negative_labels(labels)
    refuse_negative_ids(prompt_ids, PROMPT_IDS)
    return RowTokens(ids, labels, prompt_ids, per_token)


def trains_on_all(row: Mapping[str, Any]) -> bool:
    """Return whether no column of a tokenised row says which of its tokens are trained on."""
    return all(row.get(column) is None for column in ("labels", *_TRAINED_MASKS))


def lengths_of(position_ids: Sequence[int]) -> list[int]:
    """Return how long each sample of a row is, whose `position_ids` start again at each."""
    starts = [index for index, position in enumerate(position_ids) if position == 0 or index == 0]
    return [end - start for start, end in pairwise([*starts, len(position_ids)])]


def id_list(value: Any, column: str) -> list[int]:
    """Return a row's token ids as a list; raise RowDropped if its value in a column is not one."""
    try:
        return [operator.index(token_id) for token_id in _plain(value)]
    except TypeError:
        raise RowDropped(f"{column} is not a list of token ids") from None


def refuse_negative_ids(ids: Sequence[int], column: str) -> None:
    """Raise RowDropped if a row's token ids, without padding, are not all counted from 0."""
    if ids and min(ids) < 0:
        raise RowDropped(f"a negative token id in {column}")


def refuse_negative_labels(labels: Sequence[int]) -> None:
    """Raise RowDropped for a negative label that would be trained on: some formats mark by -1 what is not."""
    if any(label < 0 and label != IGNORE_INDEX for label in {*labels}):
        raise RowDropped(NEGATIVE_LABEL)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value

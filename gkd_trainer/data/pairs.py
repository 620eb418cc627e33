"""The tokens of a row for an encoder-decoder: what the encoder reads, and the labels that the decoder predicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data.tokens import SEQ_LENGTHS, RowDropped, RowTokens, held_tokens, id_list, refuse_negative_labels
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import prompt_length

_NOT_FOR_PAIRS = ("completion_mask", "assistant_masks", "decoder_input_ids", "decoder_attention_mask", SEQ_LENGTHS)


def held_pair(row: Mapping[str, Any]) -> RowTokens:
    """Return a row's `input_ids`, which the encoder reads, and its `labels`, empty if it has none.

    Raises:
        RowDropped: A column is not a list of token ids, has a negative one, or is not as long as `input_ids`.
        GKDDataError: The row has a column that only causal LMs use, or decoder inputs.

    """
    for column in _NOT_FOR_PAIRS:
        if row.get(column) is not None:
            raise GKDDataError(
                f"an encoder-decoder's rows of tokens have input_ids, attention_mask and labels; got {column}: leave "
                "it out (the decoder reads the labels, shifted, and all of them are trained on)"
            )
    encoded = held_tokens({column: value for column, value in row.items() if column != "labels"})
    labels = [] if row.get("labels") is None else id_list(row["labels"], "labels")
    while labels and labels[-1] == IGNORE_INDEX:  # padding
        labels.pop()
    refuse_negative_labels(labels)
    return replace(encoded, labels=labels, prompt_ids=[])


def text_pair(tokenizer: Any, prompt: str, completion: str | None, stop_ids: Collection[int]) -> RowTokens:
    """Return two texts as the tokenizer encodes a source and a target, with its special tokens.

    The eos is appended to a target without any of `stop_ids`. Without a completion there are no labels.

    Raises RowDropped if one of the texts is empty.
    """
    if not prompt:
        raise RowDropped("empty prompt")
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if completion is None:
        return RowTokens(ids, [])
    if not completion or not tokenizer(text_target=completion, add_special_tokens=False, verbose=False)["input_ids"]:
        raise RowDropped("empty completion")
    labels = list(tokenizer(text_target=completion, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and not set(stop_ids).intersection(labels):
        labels.append(tokenizer.eos_token_id)
    return RowTokens(ids, labels)


def turn_pair(tokens: RowTokens) -> RowTokens:
    """Return a conversation cut at its last trained turn: the prompt of the turn, and its tokens as labels."""
    start = prompt_length(tokens.labels)
    labels = tokens.labels[start:]
    while labels and labels[-1] == IGNORE_INDEX:  # the template's text behind the turn
        labels.pop()
    return RowTokens(tokens.prompt_ids or tokens.ids[:start], labels, unended=tokens.unended)

"""Turn datasets into token ids and labels, and check collated batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS, SIDE_TENSORS, TEACHER_PROMPT_IDS
from gkd_trainer.config import GKDArguments
from gkd_trainer.data import (
    IMAGE_COLUMNS,
    ImageProcessing,
    KeepSideTensors,
    RowRules,
    TeacherRoute,
    WithImages,
    keeping_token_values,
    prepare_dataset,
)
from gkd_trainer.data.teacher_prompts import TeacherPrompts
from gkd_trainer.data.tokens import NEGATIVE_LABEL, SEQ_LENGTHS
from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.models.loading import refuse_mistral_common
from gkd_trainer.trainer.pairing import OwnedContext
from gkd_trainer.types import prompt_length

logger = logging.getLogger(__name__)

_SPLITTING = ("wrapped", "bfd_split", "bfd-requeue")
"""Packing strategies that continue a row beyond max_length in another sequence, so it must not be cut before."""


@dataclass(frozen=True)
class Preparation:
    """How the rows of a trainer's datasets become tokens.

    `stop_ids` end a completion. Token ids must be below `vocab_size`. Without a `tokenizer` (None), rows must hold
    tokens. `formatting_func` turns a row into one of a known format. `shorter` is the context that no row may exceed.
    `has_ranks` says that several ranks evaluate together, `is_encoder_decoder` that the student is one. `images` turns
    the rows' images into tokens. `route` gives each row one of several teachers. `teacher_prompts` says how a
    `teacher_prompt` becomes tokens.
    """

    args: GKDArguments
    tokenizer: Any
    stop_ids: frozenset[int]
    vocab_size: int
    formatting_func: Callable[[Any], Any] | None = None
    shorter: OwnedContext | None = None
    has_ranks: bool = False
    is_encoder_decoder: bool = False
    images: ImageProcessing | None = None
    route: TeacherRoute | None = None
    teacher_prompts: TeacherPrompts | None = None

    def prepared(self, dataset: Any, name: str, *, is_training: bool = False, is_test: bool = False) -> Any:
        """Return a dataset of token ids and labels.

        Args:
            dataset: Rows of a format that GKDMixin lists.
            name: The dataset's name in errors and the log.
            is_training: Whether to train on it: then a row needs the parts that the options train on.
            is_test: Whether to predict on it: then it keeps its rows and their order, without room for completions.

        Raises:
            GKDDataError: None of its rows can be used, or with `is_test`, not all of them.
            GKDConfigError: A row is longer than the context of student or teacher.
        """
        rules = self._rules(is_training, is_test)
        # Packed again, it would no longer be known where the samples of a row begin.
        is_packed = SEQ_LENGTHS in (getattr(dataset, "column_names", None) or ())
        dataset = prepare_dataset(
            dataset,
            self.tokenizer if self.images is None else self.images.tokenizer,
            rules,
            formatting_func=self.formatting_func,
            images=self.images,
            num_proc=getattr(self.args, "dataset_num_proc", None),
            name=name,
            route=self.route,
            teacher_prompts=self.teacher_prompts,
            needs_all=is_test,
        )
        if self.args.max_length is None and self.shorter is not None and isinstance(dataset, datasets.Dataset):
            longest = longest_row(
                dataset,
                self.args.max_new_tokens,
                is_generating=rules.is_generating,
                is_encoder_decoder=self.is_encoder_decoder,
            )
            longest.refuse_beyond(self.shorter, name)
        if not is_training and self.has_ranks and not hasattr(dataset, "__len__"):
            # Without a length, ranks pad their last batch with samples that would be counted twice.
            dataset = list(dataset)
        return dataset if is_test else self._shuffled(self._packed(dataset, name, is_training, is_packed))

    def _rules(self, is_training: bool, is_test: bool) -> RowRules:
        args: Any = self.args
        splits = not is_test and self._packs(is_training) and args.packing_strategy in _SPLITTING
        return RowRules(
            stop_ids=self.stop_ids,
            max_length=None if splits else args.max_length,
            max_new_tokens=args.max_new_tokens,
            train_on=args.train_on,
            is_generating=(args.generates and not is_test) or (args.eval_on_policy and not is_training),
            needs_completion=is_training and not (args.is_always_on_policy or args.seq_kd),
            needs_prompt=is_training and args.is_always_on_policy,
            text_field=getattr(args, "dataset_text_field", "text"),
            vocab_size=self.vocab_size,
            is_encoder_decoder=self.is_encoder_decoder,
        )

    def _packs(self, is_training: bool) -> bool:
        args: Any = self.args  # of trl.SFTConfig
        if not is_training and getattr(args, "eval_packing", None) is not None:
            return bool(args.eval_packing)
        return bool(getattr(args, "packing", False))

    def _packed(self, dataset: Any, name: str, is_training: bool, is_packed: bool) -> Any:
        args: Any = self.args
        packs = self._packs(is_training)
        joins = "packing" if packs else "padding_free" if getattr(args, "padding_free", False) else None
        if joins is not None and TEACHER_PROMPT_IDS in (getattr(dataset, "column_names", None) or ()):
            raise GKDConfigError(
                f"{name}: {joins} joins rows, so the teacher can't read a prompt of its own for each: set "
                f"{joins}=False, or remove the column teacher_prompt"
            )
        if not packs or is_packed:
            return dataset
        if isinstance(dataset, list):  # a stream, read into memory
            dataset = datasets.Dataset.from_list(dataset)
        if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            raise GKDConfigError(
                f"{name}: packing joins the rows of a datasets.Dataset or IterableDataset; got "
                f"{type(dataset).__name__}: convert it with datasets.Dataset.from_list(list(rows)), or set "
                "packing=False"
            )
        if self.images is not None and not set(IMAGE_COLUMNS).isdisjoint(dataset.column_names or ()):
            raise GKDConfigError(
                f"{name}: packing joins token ids, and would leave out the images of the rows: set packing=False (and "
                "eval_packing=False)"
            )
        for side in SIDE_TENSORS.values():
            if side.is_column and side.name in (dataset.column_names or ()):
                logger.warning("%s: packing joins rows, so the column %s is dropped", name, side.name)
        # Before too, as trl.SFTTrainer does: else neighbours would stay in one sequence.
        dataset = self._shuffled(dataset.select_columns(["input_ids", "labels"]))
        return pack_dataset(dataset, args.max_length, args.packing_strategy)

    def _shuffled(self, dataset: Any) -> Any:
        args: Any = self.args
        is_shuffled = getattr(args, "shuffle_dataset", False)  # an option of trl.SFTConfig
        if is_shuffled and isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            return dataset.shuffle(seed=args.seed)
        return dataset


class PreparedOnce:
    """Prepares a trainer's own datasets, each once, whenever it is set.

    Args:
        prepare: Prepares a dataset, given its name and use.
    """

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self._prepare = prepare
        self._prepared: dict[tuple[str, bool], Any] = {}

    def __call__(self, dataset: Any, name: str, *, is_training: bool = False, is_drawn: bool = True) -> Any:
        """Return a dataset prepared; a dictionary of them by name if it is one, and None if there is none.

        `is_drawn` tells whether the run will surely draw from it.
        """
        use = {"is_training": is_training, "is_drawn": is_drawn}
        if isinstance(dataset, dict) and not is_training:
            return {each: self(rows, each, **use) for each, rows in dataset.items()}
        if dataset is None or dataset is self._prepared.get((name, is_training)):
            return dataset
        prepared = self._prepared[name, is_training] = self._prepare(dataset, name, **use)
        return prepared


@dataclass(frozen=True)
class LongestRow:
    """The tokens of the longest row of a dataset, and of the longest prompt with its completion; 0 for none."""

    tokens: int
    completed: int

    def refuse_beyond(self, shorter: OwnedContext, name: str) -> None:
        """Raise GKDConfigError if the longest row of the dataset `name` exceeds a context."""
        needed, context = max(self.tokens, self.completed), shorter.context
        if needed > context.limit:
            completed = " with max_new_tokens" if self.completed > self.tokens else ""
            raise GKDConfigError(
                f"{name}: max_length=None does not cut rows, but the longest needs {needed} tokens{completed}, more "
                f"than the {shorter.owner}'s context, {context.limit} tokens: {context.remedy}"
            )


def longest_row(
    dataset: datasets.Dataset, max_new_tokens: int, *, is_generating: bool, is_encoder_decoder: bool = False
) -> LongestRow:
    """Return the longest row of a prepared dataset.

    With `is_generating`, each prompt gets a completion of `max_new_tokens`; without, only rows that are bare prompts,
    which an evaluation completes. An encoder-decoder reads the prompt and the completion each in a context of its own.
    """
    tokens = completed = 0
    columns = {"input_ids", "labels", PROMPT_IDS} & {*dataset.column_names}
    for rows in dataset.with_format(None).select_columns(sorted(columns)).iter(batch_size=1000):
        ids, labels = rows["input_ids"], rows.get("labels", rows["input_ids"])
        for length, row_labels, own in zip(map(len, ids), labels, rows.get(PROMPT_IDS, repeat(())), strict=False):
            tokens = max(tokens, length, len(row_labels))
            if is_encoder_decoder:
                completed = max(completed, max_new_tokens if is_generating or not row_labels else 0)
                continue
            prompt = len(own) or prompt_length(row_labels)
            if is_generating or prompt == length:
                completed = max(completed, prompt + max_new_tokens)
    return LongestRow(tokens, completed)


def is_stream(dataset: Any) -> bool:
    """Return whether the rows of a dataset are streamed."""
    return isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset)


def keeping_columns(collator: Any, images: ImageProcessing | None = None) -> Any:
    """Return a collator wrapped to keep rows' values per token and side tensors, and with `images`, their images."""
    if isinstance(collator, KeepSideTensors | WithImages):
        return collator
    collator = KeepSideTensors(keeping_token_values(collator))
    return collator if images is None else WithImages(collator, images)


def require_labels(inputs: Mapping[str, Any]) -> None:
    """Raise GKDDataError if a collated batch has no labels."""
    if "labels" not in inputs or inputs["labels"] is None:
        raise GKDDataError(
            f"the data collator returned no labels, only {', '.join(sorted(inputs))}: return labels [B, L] with the "
            "token ids, and -100 for tokens that are not trained on, or leave data_collator out"
        )


def refuse_negative_labels(inputs: Mapping[str, Any]) -> None:
    """Raise GKDDataError if a collated batch has a negative label to train on; only while it is on the CPU."""
    labels = inputs["labels"]
    if not (isinstance(labels, torch.Tensor) and labels.device.type == "cpu"):  # looking would wait
        return
    is_negative = (labels < 0) & (labels != IGNORE_INDEX)
    if is_negative.any():
        raise GKDDataError(
            f"the data collator returned {NEGATIVE_LABEL}: {labels[is_negative][0]}. Put {IGNORE_INDEX} in its place"
        )


def tokenizer_of(processing_class: Any) -> Any:
    """Return a tokenizer, or the one in a processor of several modalities; None if there is none.

    Raises GKDConfigError for one that can't be used.
    """
    # Tokenizers hold others: those of code from the hub, and mistral-common's.
    is_tokenizer = isinstance(processing_class, PreTrainedTokenizerBase)
    tokenizer = processing_class if is_tokenizer else getattr(processing_class, "tokenizer", processing_class)
    refuse_mistral_common(tokenizer)
    return tokenizer


def pad_token_id(processing_class: Any) -> int:
    """Return the id that pads batches: the pad token, or eos, or 0. It is always masked."""
    tokenizer = tokenizer_of(processing_class)
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return int(token_id)
    return 0

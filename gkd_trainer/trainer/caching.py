"""Have a teacher score a dataset once, and write its predictions to a cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from torch import nn
from transformers.utils.logging import tqdm
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer.batch_keys import IGNORE_INDEX, MEDIA_INPUTS, TEACHER_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.data import ImageProcessing
from gkd_trainer.data.collate import holds_several_samples, read_row
from gkd_trainer.data.tokens import held_tokens
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.models.decoders import is_encoder_decoder
from gkd_trainer.models.heads import vocabulary_size
from gkd_trainer.models.loading import base_model
from gkd_trainer.rollouts.build import find_stop_ids
from gkd_trainer.teachers import CachedTeacher, Teacher, describe, pad_tokens_of, shared_vocabulary_size
from gkd_trainer.teachers.base import AligningTeacher, CompositeTeacher, all_teachers
from gkd_trainer.teachers.cache import CacheWriter, Manifest, Part, folder_to_write, source_of
from gkd_trainer.teachers.cache.format import Kind
from gkd_trainer.teachers.prompt_scores import TokenSequence
from gkd_trainer.trainer.pairing import fitted_into, shorter_context
from gkd_trainer.trainer.preparation import Preparation, pad_token_id, tokenizer_of
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)

_SORTED_BATCHES = 16
"""Batches whose rows are sorted by length together, so that a batch has little padding."""


_MORE_THAN_TOKENS = MEDIA_INPUTS | {"image", "images", "videos", TEACHER_INDEX, TEACHER_PROMPT_IDS}
"""Columns on which a teacher's predictions may depend beside the tokens."""


def cache_predictions(
    teacher: Teacher,
    dataset: Any,
    folder: str | Path,
    args: Any,
    *,
    student: nn.Module | None = None,
    processing_class: Any = None,
    formatting_func: Callable[[Any], Any] | None = None,
    kind: Kind | None = None,
    compression: Literal["auto", "none", "zstd"] = "auto",
    shard_mb: float = 256.0,
    batch_size: int = 8,
    part: tuple[int, int] | None = None,
) -> Manifest:
    """Have a teacher score the rows of a dataset, prepared as for training, and write a cache for CachedTeacher.

    A folder that has some of the rows already is continued.

    Args:
        teacher: The teacher, in this process or behind servers; not prepared yet.
        dataset: Rows of a format that GKDTrainer takes.
        folder: The cache.
        args: A GKDConfig with `lmbda=0`, and the `max_length` and `train_on` of the run to come.
        student: The student, whose weights are not used; None for the teacher's model.
        processing_class: The student's tokenizer, or a processor that holds one; None for rows of token ids.
        formatting_func: The one of the run to come.
        kind: What to store (see CacheWriter); by default "topk" for a teacher that gives its top tokens, else "hidden".
        compression: Whether to compress rows (see CacheWriter).
        shard_mb: Size of a file in MiB (see CacheWriter).
        batch_size: Number of rows to score at once.
        part: (2, 4) takes the second of every four rows, and writes them to `folder`/part-2-of-4: one process can write
            each part, and CachedTeacher(folder) reads all. None takes all rows.

    Returns:
        The manifest of the complete cache, or part.

    Raises:
        GKDError: The rows can't be prepared, the teacher can't score them, or the folder can't be written.
    """
    _refuse_unfit(teacher, args, batch_size)
    chosen = None if part is None else Part(number=part[0], count=part[1])
    folder = folder_to_write(Path(folder), chosen)
    dataset, name = _rows_of(dataset, chosen)
    model = student if student is not None else teacher.model
    if model is None:
        raise GKDConfigError("a teacher behind a server needs the student, for which the rows are prepared: pass it")
    for each in (model, teacher.model):
        if each is not None and is_encoder_decoder(base_model(each)):
            raise GKDConfigError(
                f"{type(base_model(each)).__name__} is an encoder-decoder, but a cache holds a causal LM's "
                "predictions: train with the teacher itself"
            )
    tokenizer = tokenizer_of(processing_class)
    vocabulary = None if tokenizer is None else tokenizer.get_vocab()
    shorter = shorter_context(model, teacher)
    args = fitted_into(shorter, args)
    teacher.prepare(args.device, tokenizer, args.max_length)
    student_size = vocabulary_size(base_model(model))
    pad_tokens = pad_tokens_of(tokenizer, teacher.tokenizer)
    shared_vocabulary_size(student_size, teacher.vocab_size, vocabulary, teacher.vocabulary, pad_tokens)
    rows = Preparation(
        args,
        tokenizer,
        stop_ids=frozenset(find_stop_ids(base_model(model), tokenizer)),
        vocab_size=min(student_size, teacher.vocab_size or student_size),
        formatting_func=formatting_func,
        shorter=shorter,
        images=ImageProcessing.of(processing_class),
    ).prepared(dataset, name, is_training=True)
    source = source_of(
        teacher, tokenizer, name=describe(teacher).full_name, max_length=args.max_length, train_on=args.train_on
    )
    kind = kind or ("hidden" if teacher.top_k is None else "topk")
    writer = CacheWriter(
        folder,
        source,
        kind=kind,
        vocabulary=teacher.vocabulary if vocabulary is None else vocabulary,
        compress=compression,
        shard_mb=shard_mb,
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id(processing_class))
    with writer:
        is_quiet = args.disable_tqdm or args.local_process_index > 0
        new = _new_rows(rows, writer, chosen, is_quiet=is_quiet)
        for examples in _batches_by_length(new, batch_size):
            batch = TokenBatch.from_inputs(collate(examples)).to(args.device)
            writer.add(batch, teacher.score(batch))
    manifest = writer.manifest
    assert manifest is not None  # a cache without rows is an error
    return manifest


def _refuse_unfit(teacher: Teacher, args: Any, batch_size: int) -> None:
    if batch_size < 1:
        raise GKDConfigError(f"batch_size must be at least 1; got {batch_size}")
    if args.generates:
        raise GKDConfigError("only the data can be cached, not completions to come: set lmbda=0 and seq_kd=False")
    if any(isinstance(each, CachedTeacher) for each in all_teachers(teacher)):
        raise GKDTeacherError("the teacher to cache is a cache already: pass the teacher itself")
    if any(isinstance(each, AligningTeacher) for each in all_teachers(teacher)):
        raise GKDTeacherError(
            "a cache holds predictions over the student's tokens, but this teacher reads other tokens: train with it "
            "in this process, without a cache"
        )
    if teacher.shares_weights:
        raise GKDTeacherError(
            f"a {type(teacher).__name__} is the student, which training changes: only a teacher of its own can be "
            "cached"
        )
    if isinstance(teacher, CompositeTeacher):
        raise GKDTeacherError(
            f"a cache holds the predictions of one teacher; got {type(teacher).__name__}: cache each of its teachers, "
            "and combine the CachedTeachers"
        )


def _rows_of(dataset: Any, part: Part | None) -> tuple[Any, str]:
    """Return the rows of a part of a dataset, or of all of it, and their name."""
    if part is None:
        return dataset, "train"
    name = f"train (part {part})"
    if isinstance(dataset, list):
        dealt: Any = dataset[part.rows]
    elif isinstance(dataset, datasets.Dataset):
        dealt = dataset.select(range(len(dataset))[part.rows])
    elif isinstance(dataset, datasets.IterableDataset):
        own = part.number - 1
        return dataset.filter(lambda _, index: index % part.count == own, with_indices=True), name
    else:
        raise GKDDataError(
            f"{name}: expected a datasets.Dataset, a datasets.IterableDataset or a list of dicts, whose rows can be "
            f"dealt out; got {type(dataset).__name__}: convert it with datasets.Dataset.from_list(list(rows))"
        )
    if len(dealt) == 0:
        raise GKDDataError(f"{name}: there are only {len(dataset)} rows: divide them into as many parts at most")
    return dealt, name


def _new_rows(rows: Any, writer: CacheWriter, part: Part | None, *, is_quiet: bool) -> Iterator[dict[str, Any]]:
    """Yield token ids and labels of the rows that the cache lacks."""
    title, data = "Caching", "the data to cache"
    if part is not None:
        title, data = f"{title} part {part}", f"part {part} of {data}"
    total = len(rows) if hasattr(rows, "__len__") else None
    for index, row in enumerate(tqdm(rows, desc=title, total=total, disable=is_quiet)):
        if unread := sorted(name for name in _MORE_THAN_TOKENS & row.keys() if _is_given(row[name])):
            raise GKDDataError(
                f"rows of the data to cache have {', '.join(unread)}, but a cache holds one teacher's predictions for "
                "the row's own tokens alone: remove the column and cache each teacher by itself, or train with the "
                "teacher in this process"
            )
        tokens = read_row(held_tokens, row, f"row {index} of {data}")
        if holds_several_samples(tokens):
            raise GKDDataError(
                f"the position_ids of row {index} of {data} start again, so it holds several samples: cache rows of "
                "one sample each; packed rows then find theirs"
            )
        sequence = _sequence(tokens.ids, tokens.labels)
        if sequence is not None and not writer.has(sequence):
            yield {"input_ids": tokens.ids, "labels": tokens.labels}


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and len(value) == 0)


def _sequence(ids: list[int], labels: list[int]) -> TokenSequence | None:
    targets_P = np.flatnonzero(np.array(labels[1:]) != IGNORE_INDEX) + 1
    return TokenSequence(ids[: targets_P[-1] + 1], targets_P) if len(targets_P) else None


def _batches_by_length(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    window: list[Mapping[str, Any]] = []

    def batches() -> Iterator[list[Mapping[str, Any]]]:
        window.sort(key=lambda row: len(row["input_ids"]))
        for start in range(0, len(window), size):
            yield window[start : start + size]
        window.clear()

    for row in rows:
        window.append(row)
        if len(window) == size * _SORTED_BATCHES:
            yield from batches()
    yield from batches()

"""A teacher whose predictions were written to disk before training.

Shapes: N positions trained on, P positions of one sequence, L length, M sequences that are not in the cache.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.batch_keys import IGNORE_INDEX, ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.models.prompts import writes_date
from gkd_trainer.signals import Head, HiddenSignal, Signal, TopKSignal
from gkd_trainer.teachers.base import AligningTeacher, CompositeTeacher, Teacher, all_teachers
from gkd_trainer.teachers.cache.format import (
    CacheSource,
    Manifest,
    StoredWitness,
    dtype_name,
    refuse_another_served,
    template_digest,
    weights_digest,
)
from gkd_trainer.teachers.cache.joined import JoinedReader, read_manifests
from gkd_trainer.teachers.cache.kinds import Values, values_of
from gkd_trainer.teachers.cache.reader import read_vocabulary
from gkd_trainer.teachers.description import TeacherDescription, describe
from gkd_trainer.teachers.prompt_scores import TokenSequence, sequences_of
from gkd_trainer.transfer import to_device
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)


class CachedTeacher(CompositeTeacher):
    """Reads a teacher's predictions from folders that `gkd-trainer cache` wrote, for data that does not change.

    Rows are found by their token ids, so their order, the number of workers and ranks, and filters do not matter; a
    longer row serves its prefixes. Files are mapped into memory, and each row is checked when it is read.

    Args:
        folder: The cache, or several of one teacher, such as those of several datasets. A folder of parts stands for
            all of them. A row that is in more than one cache is read from the first.
        fallback: The teacher that was cached, to score rows that the cache lacks. Without one, such a row is an error,
            so that the student can't be trained on completions generated during training.

    Raises:
        GKDTeacherError: There is no cache in a folder, or only some of its parts; its manifest was changed; the caches
            are not of one teacher; or `fallback` can't stand in for it.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], fallback: Teacher | None = None
    ) -> None:
        folders = [folder] if isinstance(folder, str | os.PathLike) else folder
        self._names, self._fallback = ", ".join(map(str, folders)), fallback
        self._manifests = read_manifests(map(Path, folders))
        # What the caches must have in common is read from the first.
        self._folder, self._manifest = next(iter(self._manifests.items()))
        self._vocabulary = read_vocabulary(self._folder, self._manifest)
        self._reader: JoinedReader | None = None
        self._head: Head | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._has_missed = False
        if fallback is not None and any(isinstance(each, AligningTeacher) for each in all_teachers(fallback)):
            raise GKDTeacherError(
                "the fallback of a cache must predict over the student's tokens, but this one reads other tokens: "
                "train with it in this process, without a cache"
            )
        if fallback is not None and fallback.shares_weights:
            raise GKDTeacherError(
                "the fallback of a cache must be the teacher that was cached, but this one shares weights with the "
                "student: pass a separate teacher"
            )
        if fallback is not None:
            self._require(self._folder, "top_k", fallback.top_k, self._manifest.top_k)

    def score(self, batch: TokenBatch) -> Signal:
        """Return the cached predictions at the batch's scored positions, and the fallback's for rows without any.

        Raises:
            GKDTeacherError: A file of the cache was changed or cut short.
            GKDDataError: A row is not in the cache, and there is no fallback; the batch holds more than token ids; or
                prompts of the teacher's own.
        """
        reader, sequences = self._opened("score"), self._sequences(batch)
        found = [reader.read(sequence) for sequence in sequences]
        missing = [index for index, values in enumerate(found) if values is None]
        device = batch.labels_BL.device
        if missing:
            live = self._scored_live(batch, sequences, missing)
            for index, values in zip(missing, live, strict=True):
                found[index] = values
        return self._signal([values for values in found if values is not None], device)

    def check_rows(self, rows: Iterable[tuple[int, TokenBatch]] | None, name: str) -> None:
        """Look up rows before any is drawn; log how many the fallback will score.

        Args:
            rows: The number of each row in its dataset, and a batch of it alone, as it will be collated; None if that
                can't be known ahead.
            name: The dataset's name in errors and the log.

        Raises:
            GKDDataError: Rows are not in the cache, or are bare prompts, which the student completes before they are
                scored, and there is no fallback; or see `score`.
            GKDTeacherError: The rows can't be looked up now, the cache is not complete, and there is no fallback.
        """
        reader = self._opened("check_rows")
        if rows is None:
            if self._fallback is None and (incomplete := self._incomplete()):
                raise GKDTeacherError(
                    f"{'. '.join(incomplete)}, and the rows of {name} can't be looked up before they are drawn. Run "
                    "the `gkd-trainer cache` command that began it again, which continues it, or set "
                    "teacher_cache_miss='teacher' (CachedTeacher's fallback)"
                )
            return
        n_rows = n_missing = 0
        first = ""
        prompts = []
        for number, batch in rows:
            n_rows += 1
            sequences = self._sequences(batch)
            if bool((batch.on_host.labels_BL == IGNORE_INDEX).all()):
                prompts.append(number)
            lacking = [index for index, sequence in enumerate(sequences) if not reader.has(sequence)]
            if lacking:
                n_missing += 1
                first = first or f"row {number}: {self._description(batch, sequences, lacking[0])}"
        if prompts and self._fallback is None:
            raise GKDDataError(
                f"{name}: {len(prompts)} of {n_rows} rows looked up are prompts without a completion, such as row "
                f"{prompts[0]}; the student will complete them, and no cache can have its completions: add a "
                "completion to each, leave them out, or set teacher_cache_miss='teacher' (CachedTeacher's fallback)"
            )
        if n_missing == 0:
            return
        counted = f"{name}: {n_missing} of {n_rows} rows looked up are not in the cache in {self._names}"
        if self._fallback is not None:
            logger.info("%s: the teacher scores them.", counted)
            return
        raise GKDDataError(
            f"{counted}, or not the predictions for all of their tokens trained on; the first is {first}. "
            f"{self._remedy()}"
        )

    def _opened(self, caller: str) -> JoinedReader:
        if self._reader is None:
            raise RuntimeError(f"CachedTeacher.{caller} was called before prepare(device)")
        return self._reader

    def _sequences(self, batch: TokenBatch) -> list[TokenSequence]:
        if batch.label_offset != 1:
            raise GKDDataError("the rows of an encoder-decoder can't be cached: use its teacher in this process")
        prompts_BP = batch.on_host.side.get(TEACHER_PROMPT_IDS)
        if prompts_BP is not None and bool((prompts_BP != IGNORE_INDEX).any()):
            raise GKDDataError(
                f"the cache in {self._names} holds predictions for the rows' own prompts, but this batch has prompts "
                "of the teacher's own: remove the column teacher_prompt, or train with the teacher itself"
            )
        return sequences_of(batch)

    @property
    def manifests(self) -> Mapping[Path, Manifest]:
        """What was cached, from which teacher, by folder."""
        return self._manifests

    @property
    def fallback(self) -> Teacher | None:
        """The teacher that scores rows that the cache lacks."""
        return self._fallback

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The fallback, if any."""
        return [] if self._fallback is None else [self._fallback]

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the cached teacher predicts over; None if unknown."""
        return self._manifest.source.vocab_size

    @property
    def top_k(self) -> int | None:
        """How many tokens of each distribution were cached; None for full distributions."""
        return self._manifest.top_k

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the tokenizer that the cache was made with; None if unknown."""
        return self._vocabulary

    @property
    def model(self) -> PreTrainedModel | None:
        """The fallback's model, if it has one in this process."""
        return None if self._fallback is None else self._fallback.model

    @property
    def is_local(self) -> bool:
        """False: reading a file may fail for only one rank."""
        return False

    @property
    def can_generate(self) -> bool:
        """Whether the fallback can complete prompts."""
        return self._fallback is not None and self._fallback.can_generate

    def check_options(self, args: GKDArguments) -> None:
        """Raise GKDTeacherError if a cache was made with options that the run's don't fit."""
        if args.teacher_top_k is not None:
            self._require(self._folder, "teacher_top_k", args.teacher_top_k, self.top_k)
        for folder, manifest in self._manifests.items():
            if manifest.source.train_on == "last_turn":  # of all turns, the last is a part
                self._require(folder, "train_on", args.train_on, manifest.source.train_on)

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Check that the cache fits the run, and open it; an incomplete one serves the rows that it has so far.

        The tokenizer's map is compared with `vocabulary` where the models are paired. Rows may be shorter than the
        cached ones, but not longer.

        Raises:
            GKDTeacherError: The run's chat template or `max_length` is not the cache's, the fallback is not the cached
                teacher, or the cache is damaged.
        """
        for folder, manifest in self._manifests.items():
            template, longest = manifest.source.chat_template, manifest.source.max_length
            if tokenizer is not None and None not in (template, template_digest(tokenizer)):
                self._require(folder, "chat_template", template_digest(tokenizer), template)
            if longest is not None and (max_length is None or max_length > longest):
                raise GKDTeacherError(
                    f"the cache in {folder} holds rows of up to max_length={longest} tokens, but this run has "
                    f"max_length={max_length}: set it to {longest} or less, or make a cache with this run's"
                )
        if self._fallback is not None:
            self._fallback.prepare(device, tokenizer, max_length)
            self._check_fallback(self._fallback)
        self._tokenizer = tokenizer
        self._reader = JoinedReader(self._manifests)
        for incomplete in self._incomplete():
            logger.warning("%s.", incomplete)
        head = self._reader.head
        self._head = None if head is None else _moved(head, device)

    def _check_fallback(self, fallback: Teacher) -> None:
        source, model = self._manifest.source, fallback.model
        self._require(self._folder, "vocab_size", fallback.vocab_size, source.vocab_size)
        weights = None if model is None else weights_digest(model)
        if model is not None:
            self._require(self._folder, "dtype", dtype_name(model.dtype), source.dtype)
            self._require(self._folder, "weights", weights, source.weights)
        if weights is None:  # unknown, so its name counts, and what it says
            name = describe(fallback).full_name
            self._require(self._folder, "teacher", name, source.teacher)
            refuse_another_served(
                self._folder, source, CacheSource(teacher=name, witness=StoredWitness.of(fallback.witness))
            )

    def _require(self, folder: Path, name: str, given: object, cached: object) -> None:
        if given != cached:
            raise GKDTeacherError(
                f"the cache in {folder} was made with another {name}: {cached!r} there, {given!r} in this run. "
                "Use what it was made with, or make a cache for this run"
            )

    def _signal(self, rows: list[Values], device: torch.device) -> Signal:
        manifest = self._manifest
        if manifest.kind == "topk":
            ids_NK = torch.cat([torch.empty(0, manifest.width, dtype=torch.int64), *(ids for ids, _ in rows)])
            log_p_NK = torch.cat([torch.empty(0, manifest.width), *(log_p for _, log_p in rows)])
            known = manifest.source.vocab_size
            if known is None:  # a server's
                largest = int(ids_NK.max()) if ids_NK.numel() > 0 else 0
                known = max([largest, *(self._vocabulary or {}).values()]) + 1
            return TopKSignal(to_device(ids_NK, device), to_device(log_p_NK, device), known)
        assert self._head is not None
        dtype: torch.dtype = getattr(torch, manifest.dtype)
        nothing_NH = torch.empty(0, manifest.width, dtype=dtype)
        hidden_NH = torch.cat([nothing_NH, *(hidden_PH.to(dtype) for (hidden_PH,) in rows)])
        return HiddenSignal(to_device(hidden_NH, device), self._head)

    def _scored_live(self, batch: TokenBatch, sequences: list[TokenSequence], missing: list[int]) -> list[Values]:
        if self._fallback is None:
            row = self._description(batch, sequences, missing[0])
            raise GKDDataError(
                f"a row is not in the cache in {self._names} ({row}), or not the predictions for all "
                f"{len(sequences[missing[0]].targets_P)} of its tokens trained on. {self._remedy()}"
            )
        if not self._has_missed:
            self._has_missed = True
            logger.info("Some rows are not in the cache in %s: the teacher scores them.", self._names)
        asked = [sequences[index] for index in missing]
        signal = self._fallback.score(_batch_of(asked, batch.labels_BL.device))
        values = values_of(signal, self._manifest.kind)
        counts = [len(sequence.targets_P) for sequence in asked]
        return list(zip(*(value.split(counts) for value in values), strict=True))

    def _incomplete(self) -> list[str]:
        """Return a sentence for each cache that is not complete, without its full stop."""
        incomplete = {folder: each.shards for folder, each in self._manifests.items() if not each.is_complete}
        return [
            f"The cache in {folder} is not complete: it holds {sum(shard.rows for shard in shards)} rows so far"
            for folder, shards in incomplete.items()
        ]

    def _description(self, batch: TokenBatch, sequences: list[TokenSequence], index: int) -> str:
        """Return what tells a row: its key, if it has one, and its tokens."""
        sequence = sequences[index]
        names = [f"{len(sequence.token_ids)} tokens, {sequence.token_ids[:8]}…"]
        keys_B = batch.on_host.side.get(ROW_KEY)
        rows = batch.on_host.rows_N.unique().tolist()
        if keys_B is not None and len(rows) == len(sequences):
            names.insert(0, f"{ROW_KEY} {int(keys_B[rows[index]])}")
        if self._tokenizer is not None:
            names.append(repr(self._tokenizer.decode(sequence.token_ids)[:80]))
        return ", ".join(names)

    def _remedy(self) -> str:
        """Return what to do about rows that are not in the cache."""
        dated = ""
        if self._tokenizer is not None and writes_date(self._tokenizer, {}):
            dated = (
                " The chat template writes today's date unless the rows give one, so rows that were cached on another "
                "day have other tokens: cache them with a fixed date (chat_template_kwargs, or a changed template)."
            )
        state = "".join(f"{incomplete}. " for incomplete in self._incomplete())
        return (
            f"{state}Add this data to it with `gkd-trainer cache` and the options of this run, or set "
            f"teacher_cache_miss='teacher' (CachedTeacher's fallback).{dated}"
        )


@describe.register
def _(teacher: CachedTeacher) -> TeacherDescription:
    first = next(iter(teacher.manifests.values()))
    return TeacherDescription(first.source.teacher, (), teacher.top_k)


def _batch_of(sequences: Sequence[TokenSequence], device: torch.device) -> TokenBatch:
    """Return a batch of sequences with the same tokens trained on."""
    ids = [torch.tensor(sequence.token_ids) for sequence in sequences]
    labels = []
    for ids_L, sequence in zip(ids, sequences, strict=True):
        labels_L = torch.full_like(ids_L, IGNORE_INDEX)
        targets_P = torch.from_numpy(sequence.targets_P)
        labels_L[targets_P] = ids_L[targets_P]
        labels.append(labels_L)
    inputs: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids_L) for ids_L in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    return TokenBatch.from_inputs(inputs).to(device)


def _moved(head: Head, device: torch.device) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return Head(head.weight_VH.to(device), bias_V, head.scale, head.softcap)

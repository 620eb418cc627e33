"""A teacher with another tokenizer: it reads the same text in its own tokens, and is compared where both begin a token.

Shapes: B batch, L length of the student's rows, P of the teacher's, N tokens trained on, V the student's tokens, W the
teacher's, M tokens that both have, K top tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.batch_keys import (
    IGNORE_INDEX,
    IS_ON_POLICY,
    MEDIA_INPUTS,
    TEACHER_COLUMNS,
    TEACHER_IDS,
    TEACHER_PROMPT_IDS,
)
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.models.heads import find_context
from gkd_trainer.models.loading import base_model, find_tokenizer, name_of, refuse_mistral_common
from gkd_trainer.models.token_bytes import token_bytes
from gkd_trainer.signals import MODES, HiddenSignal, LogitsSignal, MappedSignal, Signal, TopKSignal, VocabularyMap
from gkd_trainer.teachers.alignment import Aligner, Ints
from gkd_trainer.teachers.base import AligningTeacher, CompositeTeacher, Teacher, all_teachers
from gkd_trainer.teachers.vllm_hidden import HiddenStateServerTeacher
from gkd_trainer.teachers.vocabulary_map import map_of, top_tokens_mapped
from gkd_trainer.types import TokenBatch, prompt_length


class OtherTokenizerTeacher(AligningTeacher):
    """A teacher whose tokens are not the student's.

    A row's completion is decoded to bytes, and these are encoded by the teacher's tokenizer. Student and teacher are
    compared where both begin a token at the same byte; other positions are not trained on. The teacher reads its
    own prompt (TEACHER_PROMPT_IDS), which rows of messages get from its chat template, and then only the completion
    after it is compared; without one it reads the student's prompt in its tokens, after its bos.

    Args:
        teacher: The teacher that scores, in this process or behind a server; one model of its own, not several.
        tokenizer: Its tokenizer; by default the one stored with the model.
        mode: What is compared: "matched" (the tokens with the same bytes, and one category for all others), "next_byte"
            (the first byte of the next token), "uld" or "gold" (sorted probabilities; see `divergence.uld`). A teacher
            that gives only its top tokens needs "matched", and compares those of them that the student has.
        min_matched_mass: In [0, 1]: where the teacher gives the tokens with the same bytes less probability, "matched"
            compares the next byte instead, unless the teacher gives only its top tokens.

    Raises:
        GKDTeacherError: The tokenizer is unknown, or the bytes of its tokens are; the teacher's top tokens can't be
            compared in this mode; or it asks other teachers, or shares the student's weights.
        GKDConfigError: `mode` or `min_matched_mass` is out of range.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mode: str = "matched",
        min_matched_mass: float = 0.9,
    ) -> None:
        if mode not in MODES:
            raise GKDConfigError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
        if not 0 <= min_matched_mass <= 1:
            raise GKDConfigError(f"min_matched_mass must be in [0, 1] (0 never compares bytes); got {min_matched_mass}")
        if isinstance(teacher, CompositeTeacher) or teacher.shares_weights:
            raise GKDTeacherError(
                "a teacher with another tokenizer must be a single model of its own; got "
                f"{type(teacher).__name__}: pass a FrozenTeacher, or one behind a server"
            )
        if teacher.top_k is not None and mode != "matched":
            raise GKDTeacherError(
                f"mode={mode!r} needs the teacher's full distribution, but this one gives its top {teacher.top_k} "
                "tokens: use mode='matched', or a teacher in this process without a top k"
            )
        refuse_mistral_common(tokenizer)
        self._teacher, self._mode, self._min_matched_mass = teacher, mode, min_matched_mass
        self.tokenizer = tokenizer or _tokenizer_of(teacher)
        token_bytes(self.tokenizer)  # raises if they can't be known
        self._prepared: _Prepared | None = None

    def comparable(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with each sample in the teacher's tokens, and the labels of tokens at shared bytes only.

        Raises:
            GKDDataError: The batch joins samples in one row, or has images, videos or sound.
        """
        if TEACHER_COLUMNS in inputs:
            return inputs
        prepared = self._ready()
        _refuse_unreadable(inputs)
        ids_BL, labels_BL, own_BP = inputs["input_ids"], inputs["labels"], inputs.get(TEACHER_PROMPT_IDS)
        is_generated_B = inputs.get(IS_ON_POLICY)
        is_generated = [False] * len(ids_BL) if is_generated_B is None else is_generated_B.tolist()
        mask_BL = inputs.get("attention_mask")
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
        is_kept_BL = np.zeros(ids_BL.shape, dtype=bool)
        prompts = [[]] * len(ids_BL) if own_BP is None else own_BP.tolist()
        teacher_ids, teacher_columns = [], []
        rows = zip(*(tensor.cpu().numpy() for tensor in (ids_BL, labels_BL, real_BL)), strict=True)
        for row, (ids_L, labels_L, real_L) in enumerate(rows):
            place_L = np.flatnonzero(real_L)
            prompt = [each for each in prompts[row] if each != IGNORE_INDEX]
            sample = prepared.sample(ids_L[place_L], labels_L[place_L], prompt, is_generated=is_generated[row])
            is_kept_BL[row, place_L[sample.kept]] = True
            teacher_ids.append(torch.as_tensor(sample.teacher_ids, dtype=torch.long))
            teacher_columns.append(torch.as_tensor(sample.teacher_columns, dtype=torch.long))
        device = labels_BL.device
        read = {name: value for name, value in inputs.items() if name != TEACHER_PROMPT_IDS}
        return {
            **read,
            "labels": labels_BL.where(torch.from_numpy(is_kept_BL).to(device), IGNORE_INDEX),
            TEACHER_IDS: _padded(teacher_ids).to(device),
            TEACHER_COLUMNS: _padded(teacher_columns).to(device),
        }

    def score(self, batch: TokenBatch) -> Signal:
        """Return the teacher's predictions where both begin a token at the same byte."""
        prepared = self._ready()
        if TEACHER_COLUMNS not in batch.side:
            raise RuntimeError("OtherTokenizerTeacher.score got a batch that did not come from its `comparable`")
        signal = self._teacher.score(teacher_batch(batch))
        if isinstance(signal, TopKSignal):
            return top_tokens_mapped(signal, prepared.mapping)
        assert isinstance(signal, HiddenSignal | LogitsSignal)  # one teacher's, over its own tokens
        return MappedSignal(signal.sliced(len(prepared.mapping.teacher_group_W)), prepared.mapping)

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Prepare the teacher inside, and match the tokens of both.

        Rows longer than the teacher takes are cut: what comes after is not compared.

        Raises:
            GKDTeacherError: The student's tokenizer is unknown, or the bytes of its tokens are, or the teacher inside
                can't be used.
        """
        if tokenizer is None:
            raise GKDTeacherError(
                "a teacher with another tokenizer needs the student's, which is unknown: pass processing_class to the "
                "trainer"
            )
        self._teacher.prepare(device, self.tokenizer, None)
        aligner = Aligner(tokenizer, self.tokenizer)
        mapping = map_of(aligner, self._teacher.vocab_size, self._mode, self._min_matched_mass)
        self._prepared = _Prepared(aligner, tokenizer.get_vocab(), mapping.to(device), _limit_of(self._teacher))

    def _ready(self) -> _Prepared:
        if self._prepared is None:
            raise RuntimeError("OtherTokenizerTeacher was used before prepare(device, tokenizer)")
        return self._prepared

    @property
    def mode(self) -> str:
        """What is compared, one of MODES."""
        return self._mode

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The teacher that scores."""
        return (self._teacher,)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens of the student are compared: those of its tokenizer; None before `prepare`."""
        return None if self._prepared is None else len(self._prepared.mapping.student_group_V)

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each of the student's tokens, over which its signals are compared; None before `prepare`."""
        return None if self._prepared is None else self._prepared.student_vocabulary

    @property
    def top_k(self) -> int | None:
        """How many tokens of each distribution the teacher inside gives; None for full distributions."""
        return self._teacher.top_k

    @property
    def model(self) -> PreTrainedModel | None:
        """The model of the teacher inside."""
        return self._teacher.model

    @property
    def is_local(self) -> bool:
        """Whether the teacher inside computes in this process."""
        return self._teacher.is_local

    @property
    def can_generate(self) -> bool:
        """False: its model would read the student's token ids."""
        return False


def vocabulary_modes(teacher: Teacher) -> list[str]:
    """Return the modes (of MODES) in which a teacher, or those inside it, are compared over other vocabularies."""
    return sorted({each.mode for each in all_teachers(teacher) if isinstance(each, OtherTokenizerTeacher)})


def teacher_batch(batch: TokenBatch) -> TokenBatch:
    """Return a batch in the teacher's tokens, whose scored positions are those of the student's batch, in order."""
    host = batch.on_host
    ids_BP, columns_BP = host.side[TEACHER_IDS], host.side[TEACHER_COLUMNS]
    is_real_BP = ids_BP != IGNORE_INDEX
    rows_N, places_N = (columns_BP != IGNORE_INDEX).nonzero(as_tuple=True)
    if len(rows_N) != host.n_scored:
        raise RuntimeError(
            f"the batch has {len(rows_N)} positions of the teacher for {host.n_scored} scored positions: its labels "
            "were changed after OtherTokenizerTeacher.comparable"
        )
    columns_N = columns_BP[rows_N, places_N]
    labels_BP = torch.full_like(ids_BP, IGNORE_INDEX)
    labels_BP[rows_N, columns_N] = ids_BP[rows_N, columns_N]
    model_inputs = {"input_ids": ids_BP.where(is_real_BP, 0), "attention_mask": is_real_BP.long()}
    return TokenBatch(model_inputs, labels_BP, host.is_on_policy_B).to(batch.labels_BL.device)


@dataclass(frozen=True)
class _Sample:
    """A sample in the teacher's tokens: the columns of the student's row that are compared, and the teacher's."""

    teacher_ids: list[int]
    kept: Ints
    teacher_columns: Ints


@dataclass(frozen=True)
class _Prepared:
    """What a teacher knows once it has the student's tokenizer; `limit` is the teacher's longest sequence, if known."""

    aligner: Aligner
    student_vocabulary: Mapping[str, int]
    mapping: VocabularyMap
    limit: int | None

    def sample(self, ids_L: Ints, labels_L: Ints, prompt: Sequence[int], *, is_generated: bool) -> _Sample:
        """Return a sample; with a prompt of the teacher's own, only what follows the student's is compared.

        That is the last run of trained tokens, or all of a generated completion, inside of which a tool may have
        written.
        """
        is_trained_L = labels_L != IGNORE_INDEX
        breaks = np.flatnonzero(is_trained_L[1:] != is_trained_L[:-1]) + 1
        start = 0
        if prompt:
            start = int(is_trained_L.argmax()) if is_generated else prompt_length(labels_L.tolist())
        aligned = self.aligner.aligned(
            ids_L.tolist(),
            breaks.tolist(),
            start=start,
            prompt_ids=prompt or None,
            limit=self.limit,
        )
        student_A, teacher_A = aligned.student_A, aligned.teacher_A
        # Nothing predicts the first token of a row.
        is_kept_A = is_trained_L[student_A] & (student_A > 0) & (teacher_A > 0)
        return _Sample(aligned.teacher_ids, student_A[is_kept_A], teacher_A[is_kept_A])


def _tokenizer_of(teacher: Teacher) -> PreTrainedTokenizerBase:
    found = teacher.tokenizer
    if found is None:
        name = teacher.checkpoint if isinstance(teacher, HiddenStateServerTeacher) else name_of(teacher.model)
        found = find_tokenizer(name, trust_remote_code=False)
    if found is None:
        raise GKDTeacherError(
            f"the tokenizer of this {type(teacher).__name__} is unknown: pass it as tokenizer, or set "
            "teacher_tokenizer_name_or_path"
        )
    return found


def _limit_of(teacher: Teacher) -> int | None:
    if teacher.longest_sequence is not None:
        return teacher.longest_sequence
    context = None if teacher.model is None else find_context(base_model(teacher.model))
    return None if context is None else context.limit


def _refuse_unreadable(inputs: Mapping[str, Any]) -> None:
    media = next((name for name in inputs if name in MEDIA_INPUTS), None)
    if media is not None:
        raise GKDDataError(
            f"a teacher with another tokenizer reads text only, but the batch holds {media!r}: use a teacher with the "
            "student's tokenizer and processor"
        )
    positions_BL = inputs.get("position_ids")
    mask_BL = inputs.get("attention_mask")
    is_joined = any(name in inputs for name in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(positions_BL, Tensor):
        starts_BL = positions_BL == 0
        starts_BL = starts_BL if mask_BL is None else starts_BL & mask_BL.bool()
        is_joined = is_joined or bool((starts_BL.sum(dim=-1) > 1).any())
    if is_joined:
        raise GKDDataError(
            "a teacher with another tokenizer can't read rows that hold several samples: set packing=False and "
            "padding_free=False"
        )


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)

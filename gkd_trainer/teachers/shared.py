"""The student as its own teacher: its base model, another of its adapters, or the average of the adapter it trains."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.heads import InseparableHead, SeparableHead, compare, vocabulary_size
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.weights import changes_base_weights
from gkd_trainer.signals import HiddenSignal, LogitsSignal, StudentSignal
from gkd_trainer.teachers.average import AdapterAverage
from gkd_trainer.teachers.base import StudentTeacher
from gkd_trainer.teachers.frozen import masked_token, scoring_kwargs
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)

BASE, EMA = "base", "ema"

_CUT_TO_WARN_OF = 0.01


class SelfTeacher(StudentTeacher):
    """The student's own model with other adapters: there is no second set of weights.

    It scores in eval mode, so that no dropout reaches it, and leaves the student exactly as it was: training modes,
    active adapters, which weights require gradients. The student must be a PEFT model whose own weights are frozen.

    Args:
        source: "base" is the student's model with its adapter off. "ema" is that plus the average of scaling·B·A over
            the optimizer steps (see `AdapterAverage`), and begins at the adapter that training begins with. Any other
            name is an adapter of the student that is not trained, as `load_adapter(folder, adapter_name=name)` adds.
        ema_decay: For "ema", the share of the old average that stays in each step, in [0, 1).

    Raises:
        GKDTeacherError: `ema_decay` is out of range.
    """

    scores_encoder_decoders = True

    def __init__(self, source: str = BASE, *, ema_decay: float = 0.99) -> None:
        if not 0 <= ema_decay < 1:
            raise GKDTeacherError(f"ema_decay must be in [0, 1) (0 is the student's last step); got {ema_decay}")
        self._source, self._ema_decay = source, ema_decay
        self._student: Any = None
        self._head: SeparableHead | InseparableHead | None = None
        self._average: AdapterAverage | None = None
        self._vocabulary: Mapping[str, int] | None = None
        self._has_warned = False

    def attach(self, student: nn.Module, head: SeparableHead | InseparableHead | None = None) -> None:
        """Take the student to run; the average of another student's adapter is dropped.

        Raises:
            GKDTeacherError: The student has no adapter, or not that of this name, or only that; its own weights are
                trained too, or were changed to add an adapter; or its adapter can't be averaged.
        """
        if student is not self._student:
            self._require_usable(student)
            self._student = student
            self._average = AdapterAverage(self._student, self._ema_decay) if self._source == EMA else None
        self._head = head

    @property
    def source(self) -> str:
        """Which of the student's models it is: "base", "ema", or the name of an adapter."""
        return self._source

    @property
    def student(self) -> nn.Module:
        """The student that was attached last."""
        student: nn.Module = self._student
        return student

    @property
    def average(self) -> AdapterAverage | None:
        """The average of the attached student's adapter, for "ema"."""
        return self._average

    def score(self, batch: TokenBatch) -> StudentSignal:
        """Return final hidden states with the student's head, or logits if the head is inseparable.

        A batch without samples is scored by a forward of one token that is not trained on.
        """
        head = self._head
        if head is None:
            raise RuntimeError("SelfTeacher.score was called before attach(student, head)")
        if len(batch.labels_BL) == 0:
            batch = masked_token(batch)  # other ranks need this one's forward
        with _frozen(self._student, self._other_adapters()):
            kwargs = scoring_kwargs(base_model(self._student))
            # The wrapper, so that FSDP and DeepSpeed gather the weights.
            signal, _ = compare(self._student, batch, head, lambda signal: _kept(signal, head), **kwargs)
            return signal

    def update(self) -> None:
        """Update the moving average after an optimizer step."""
        if self._average is None:
            return
        self._average.update()
        if not self._has_warned and self._average.error_bound > _CUT_TO_WARN_OF:
            self._has_warned = True
            logger.warning(
                "The average of the adapter was truncated by up to %.1f %% of its norm, since its rank grew beyond its "
                "factors'. A lower ema_decay or learning rate keeps it closer.",
                100 * self._average.error_bound,
            )

    def state(self) -> Mapping[str, Tensor]:
        """Return the average, if there is one."""
        if self._average is None:
            return {}
        self._average.start()
        return self._average.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the average of a checkpoint, or from the student's adapter if there is none.

        Raises:
            GKDTeacherError: It is the average of an adapter on other layers.
        """
        if self._average is None:
            return
        self._average = AdapterAverage(self._student, self._ema_decay)
        if state:
            self._average.load_state(state)
        else:
            logger.warning("The checkpoint holds no average of the adapter: it starts again from the adapter itself.")

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens that the student predicts over; None before it is attached."""
        return None if self._student is None else vocabulary_size(base_model(self._student))

    @property
    def top_k(self) -> None:
        """None: it gives full distributions."""

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the student's tokenizer; None before `prepare`, and without one."""
        return self._vocabulary

    @property
    def model(self) -> None:
        """None: it has no model besides the student."""

    @property
    def is_local(self) -> bool:
        """True: the student runs in this process."""
        return True

    @property
    def can_generate(self) -> bool:
        """False: the student's engine generates with the adapter that is trained."""
        return False

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Note the tokenizer; Trainer places the student."""
        self._vocabulary = None if tokenizer is None else tokenizer.get_vocab()

    def _require_usable(self, student: nn.Module) -> None:
        if not isinstance(student, PeftModel):
            raise GKDTeacherError(
                f"SelfTeacher is the student with other adapters, but the student ({type(student).__name__}) is not a "
                "PEFT model: pass peft_config, or wrap the student with peft.get_peft_model"
            )
        adapters, active = [*student.peft_config], student.active_adapters
        if self._source not in (BASE, EMA):
            if self._source not in adapters:
                raise GKDTeacherError(
                    f"the student has no adapter {self._source!r}, only {', '.join(map(repr, adapters))}: load it with "
                    f"student.load_adapter(folder, adapter_name={self._source!r}), or use SelfTeacher({BASE!r}) or "
                    f"SelfTeacher({EMA!r})"
                )
            if self._source in active:
                raise GKDTeacherError(
                    f"the adapter {self._source!r} is the one that the student trains, so it would always equal its "
                    f"teacher: name another one, or use SelfTeacher({BASE!r}) or SelfTeacher({EMA!r})"
                )
        # The average adds its own B·A to the changed weights, as the student does.
        changing = [] if self._source == EMA else [n for n in adapters if changes_base_weights(student.peft_config[n])]
        if changing:
            raise GKDTeacherError(
                f"PEFT changed the student's own weights to add the adapter {changing[0]!r} (init_lora_weights or "
                "kasa_config), so turning it off does not give back the model that it was: leave those options out, or "
                f"use SelfTeacher({EMA!r}), or pass a copy of the model as teacher_model"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")  # refused below
            with _frozen(student, student.disable_adapter(), keeps_flags=False):
                trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
        if trained:
            raise GKDTeacherError(
                f"the student trains weights of its own besides its adapter ({', '.join(trained[:3])}), so turning the "
                "adapter off does not give back the model that it was: freeze them (for LoRA, bias='none')"
            )

    def _other_adapters(self) -> AbstractContextManager[None]:
        if self._source == BASE:
            adapters_off: AbstractContextManager[None] = self._student.disable_adapter()
            return adapters_off
        if self._average is None:
            return _with_adapter(self._student, self._source)
        return _averaged(self._student, self._average)


def _kept(signal: StudentSignal, head: SeparableHead | InseparableHead) -> StudentSignal:
    """Return a signal that can be read after the forward: a head that FSDP gathered in it is gone then, so copy it."""
    if isinstance(signal, LogitsSignal) or isinstance(head, InseparableHead) or not head.is_sharded:
        return signal
    whole = signal.head
    bias_V = None if whole.bias_V is None else whole.bias_V.clone()
    return HiddenSignal(signal.hidden_NH, replace(whole, weight_VH=whole.weight_VH.clone(), bias_V=bias_V))


@contextmanager
def _frozen(student: Any, adapters: AbstractContextManager[None], *, keeps_flags: bool = True) -> Iterator[None]:
    """Run a block in eval mode, without gradients and with other adapters; then undo all of it exactly.

    `keeps_flags`: PEFT changes which weights require gradients as it switches adapters. In the block they are as they
    were, since FSDP takes them over for good from the first forward that it sees.
    """
    flags = [(weight, weight.requires_grad) for weight in student.parameters()]
    in_training = [module for module in student.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad(), adapters:
            if keeps_flags:
                _set_flags(flags)
            yield
    finally:
        for module in in_training:
            module.training = True
        _set_flags(flags)


def _set_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for weight, requires_grad in flags:
        if weight.requires_grad != requires_grad:
            weight.requires_grad_(requires_grad)


@contextmanager
def _with_adapter(student: Any, name: str) -> Iterator[None]:
    tuner = student.base_model
    own, of_layers = student.active_adapter, tuner.active_adapter
    student.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(of_layers)
        student.active_adapter = own


@contextmanager
def _averaged(student: Any, average: AdapterAverage) -> Iterator[None]:
    with student.disable_adapter(), average.applied():
        yield

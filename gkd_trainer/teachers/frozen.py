"""A teacher whose model runs in this process."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import patch_environment
from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from gkd_trainer.batch_keys import DECODER_INPUT_IDS, IGNORE_INDEX, has_decoder_inputs
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.device_map import HeadCopy, input_device, is_placed
from gkd_trainer.models.heads import (
    ROUNDED_LOGITS,
    InseparableHead,
    SeparableHead,
    find_head,
    predict,
    rounds_logits,
    vocabulary_size,
    without_router_logits,
)
from gkd_trainer.models.loading import (
    auto_class,
    find_tokenizer,
    loading_failure,
    name_of,
    refuse_mistral_common,
    refuse_prompt_learning,
    refuse_unread_media,
    uncompiled,
)
from gkd_trainer.models.top_tokens import top_tokens
from gkd_trainer.signals import HiddenSignal, LogitsSignal, Signal, StudentSignal, TopKSignal
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.offload import WaitingWeights
from gkd_trainer.types import TokenBatch

logger = logging.getLogger(__name__)


class FrozenTeacher(Teacher):
    """A causal LM or an encoder-decoder in eval mode, without gradients, of any dtype, quantised or not.

    It returns final hidden states and its head, so that logits are computed only for the tokens trained on; if the head
    can't be split off safely, it returns logits, and logs that once. A model that a device map placed scores where it
    is; its predictions go to the batch's device, where its head is copied once.

    Args:
        model: The teacher: a language model of transformers, or a PEFT model around one, with its active adapter. Its
            parameters stop requiring gradients. A model from `torch.compile` runs uncompiled.
        tokenizer: Its tokenizer; by default the one stored with the model, if any.
        trust_remote_code: Whether that tokenizer may run Python code that comes with it.
        top_k: Return this many top tokens per position, with their log-probs over the teacher's whole vocabulary, as a
            remote teacher would. The mass of those that the student's vocabulary lacks then counts as outside the top
            tokens (see `TopKSignal.sliced`), whereas full distributions are normalised without it. None returns full
            distributions.
        offload: Whether its weights wait in the CPU's memory, pinned on CUDA, except while it scores: they are copied
            to the device for each batch. Nothing moves on a CPU, and a model that is quantised, sharded, or placed by a
            device map stays where it is.

    Raises:
        GKDTeacherError: `model` is not such a model, or `top_k` is not in [1, vocab_size].
        GKDConfigError: `tokenizer` is mistral-common's.
    """

    scores_encoder_decoders = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | PeftMixedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        top_k: int | None = None,
        offload: bool = False,
    ) -> None:
        refuse_mistral_common(tokenizer)
        model = _checked(model)
        self._model: Any = model.eval().requires_grad_(False)
        self._forward_kwargs = scoring_kwargs(model)
        self.tokenizer = tokenizer or find_tokenizer(name_of(model), trust_remote_code)
        self._head: SeparableHead | InseparableHead | None = None
        self._head_copy = HeadCopy()
        self._input_device: torch.device | None = None
        if top_k is not None and not 1 <= top_k <= self.vocab_size:
            raise GKDTeacherError(
                f"top_k must be in [1, {self.vocab_size}], the size of the teacher's head; got {top_k}: for full "
                "distributions leave it None"
            )
        self._top_k = top_k
        self._offload = offload
        self._waiting: WaitingWeights | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        top_k: int | None = None,
        offload: bool = False,
        **init_kwargs: Any,
    ) -> FrozenTeacher:
        """Load a teacher from the hub or a folder; `init_kwargs` go to the auto class's from_pretrained.

        Raises GKDTeacherError if that fails.
        """
        name_or_path = os.fspath(name_or_path)
        init_kwargs.setdefault("trust_remote_code", trust_remote_code)
        with _loading_unsharded():
            try:
                model = auto_class(name_or_path, init_kwargs).from_pretrained(name_or_path, **init_kwargs)
            except Exception as error:
                message = loading_failure("teacher", name_or_path, "teacher_model_init_kwargs", error)
                raise GKDTeacherError(message) from error
        tokenizer = find_tokenizer(name_or_path, init_kwargs["trust_remote_code"], init_kwargs)
        return cls(model, tokenizer, top_k=top_k, offload=offload)

    def score(self, batch: TokenBatch) -> Signal:
        """Return final hidden states with the head, or logits if the head is inseparable; or the top tokens.

        A batch without samples is scored by a forward of one token that is not trained on.
        """
        if self._head is None:
            raise RuntimeError("FrozenTeacher.score was called before prepare(device)")
        if len(batch.labels_BL) == 0:
            # A forward all the same: it gives the signal its width, and other ranks may need this one's.
            batch = masked_token(batch)
        refuse_unread_media(self._model, batch.model_inputs, "teacher")
        self._model.eval()
        with torch.no_grad(), nullcontext() if self._waiting is None else self._waiting.at_work():
            moved = batch if self._input_device is None else batch.to(self._input_device)
            signal, _ = predict(self._model, moved, self._head, **self._forward_kwargs)
            # Before it is moved: the head's device has the logits, and few tokens of them go to the batch's.
            compared = signal if self._top_k is None else top_tokens(signal, self._top_k)
            scored = self._moved(compared, batch.labels_BL.device)
            return scored if self._waiting is None else self._waiting.detached(scored)

    def _moved(self, signal: StudentSignal | TopKSignal, device: torch.device) -> Signal:
        """Return a signal on the device of the batch, with one copy of the head there for all batches."""
        if isinstance(signal, HiddenSignal):
            return HiddenSignal(signal.hidden_NH.to(device), self._head_copy.on(device, signal.head))
        if isinstance(signal, LogitsSignal):
            return LogitsSignal(signal.logits_NV.to(device))
        return TopKSignal(signal.ids_NK.to(device), signal.log_p_NK.to(device), signal.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the teacher predicts over, including those that pad its head."""
        return vocabulary_size(self._model)

    @property
    def top_k(self) -> int | None:
        """How many tokens of each distribution it gives; None for full distributions."""
        return self._top_k

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the teacher's tokenizer, if it has one."""
        return None if self.tokenizer is None else self.tokenizer.get_vocab()

    @property
    def model(self) -> PreTrainedModel:
        """The teacher's model, in its PEFT wrapper if it has one."""
        model: PreTrainedModel = self._model
        return model

    @property
    def is_local(self) -> bool:
        """True: the model runs in this process."""
        return True

    @property
    def can_generate(self) -> bool:
        """Whether transformers' `generate` takes its model, whose weights must then be on the device."""
        return not self._offload and bool(getattr(self._model, "can_generate", lambda: False)())

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Move the model to `device`, unless it was placed when loaded, and split off its head.

        With `offload`, its weights then wait on the CPU.
        """
        # Not accelerator.prepare_model: Trainer.evaluate skips preparing the student once any model is registered.
        if is_placed(self._model):
            self._input_device = input_device(self._model)
        else:
            self._model.to(device)
        self._head = find_head(self._model, on_any_device=True)
        if isinstance(self._head, InseparableHead):
            logger.warning(
                "The teacher (%s) computes full logits, which takes more memory%s: %s.",
                type(self._model).__name__,
                ROUNDED_LOGITS if rounds_logits(self._model, is_autocast=False) else "",
                self._head.reason,
            )
        if self._offload:
            self._waiting = WaitingWeights.of(self, name_of(self._model), device)


def scoring_kwargs(model: nn.Module) -> dict[str, Any]:
    """Return forward arguments for scoring: a single forward needs no cache, and a teacher no router loss."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {**({"use_cache": False} if takes_cache else {}), **without_router_logits(model)}


@contextmanager
def _loading_unsharded() -> Iterator[None]:
    """Load all of a model on each rank, even if a student is loaded on one rank (FSDP) or sharded (ZeRO-3)."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def masked_token(batch: TokenBatch) -> TokenBatch:
    """Return a batch of one token to which nothing is compared, on the device of an empty batch."""
    id_BL = torch.zeros(1, 1, dtype=torch.long)
    inputs = {"input_ids": id_BL, "attention_mask": torch.ones_like(id_BL)}
    if has_decoder_inputs(batch.model_inputs):
        inputs[DECODER_INPUT_IDS] = id_BL
    is_on_policy_B = torch.zeros(1, dtype=torch.bool)
    host = TokenBatch(inputs, torch.full_like(id_BL, IGNORE_INDEX), is_on_policy_B, batch.label_offset)
    return host.to(batch.labels_BL.device)


def _checked(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        remedy = (
            "FrozenTeacher.from_pretrained loads one by name" if isinstance(model, str | os.PathLike) else "pass one"
        )
        raise GKDTeacherError(f"expected a causal LM as the teacher; got {type(model).__name__}: {remedy}")
    model = uncompiled(model, "teacher")
    if not hasattr(model, "config"):
        raise GKDTeacherError(
            f"expected a causal LM with a config as the teacher; got {type(model).__name__}: pass a model of "
            "transformers or PEFT, unwrapped, or implement gkd_trainer.Teacher"
        )
    refuse_prompt_learning(model, "teacher")
    return model

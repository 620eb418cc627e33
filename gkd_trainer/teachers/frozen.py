"""A teacher whose model runs in this process."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.batch import Signal, TokenBatch
from gkd_trainer.heads import InseparableHead, SeparableHead, find_head, predict, vocabulary_rows
from gkd_trainer.student import find_tokenizer, name_of
from gkd_trainer.teachers.base import Teacher

logger = logging.getLogger(__name__)


class FrozenTeacher(Teacher):
    """A causal LM in eval mode, without gradients, of any dtype, quantised or not.

    It answers with final hidden states and its head, so that its logits come to exist only for the tokens
    trained on; where the head can't be taken apart safely, with logits, which it says once in the log.

    Args:
        model: The teacher. Its parameters stop requiring gradients.
        tokenizer: Its tokenizer; by default the one in the place that the model was loaded from, if any.
        trust_remote_code: Whether that tokenizer may run Python code that comes with it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._model: PreTrainedModel = model.eval().requires_grad_(False)
        parameters = inspect.signature(model.forward).parameters.values()
        takes_cache = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        # One forward of whole sequences has no use for keys and values.
        self._forward_kwargs = {"use_cache": False} if takes_cache else {}
        self._tokenizer = tokenizer or find_tokenizer(name_of(model), trust_remote_code)
        self._head: SeparableHead | InseparableHead | None = None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, trust_remote_code: bool = False, **init_kwargs: Any
    ) -> FrozenTeacher:
        """Load a teacher from the hub or a folder; `init_kwargs` go to AutoModelForCausalLM.from_pretrained."""
        init_kwargs.setdefault("trust_remote_code", trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **init_kwargs)
        tokenizer = find_tokenizer(name_or_path, init_kwargs["trust_remote_code"], init_kwargs)
        return cls(model, tokenizer)

    def score(self, batch: TokenBatch) -> Signal:
        """Return final hidden states with the head, or logits where the head is inseparable."""
        if self._head is None:
            raise RuntimeError("FrozenTeacher.score was called before prepare(device)")
        self._model.eval()
        with torch.no_grad():
            signal, _ = predict(self._model, batch, self._head, **self._forward_kwargs)
        return signal

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher's head."""
        return vocabulary_rows(self._model)

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the teacher's tokenizer, where it has one."""
        return None if self._tokenizer is None else self._tokenizer.get_vocab()

    @property
    def model(self) -> PreTrainedModel:
        """The teacher's model."""
        return self._model

    def prepare(self, device: torch.device) -> None:
        """Move the model to `device`, unless it was placed when loaded, and take its head apart."""
        # Never by accelerator.prepare_model: Trainer.evaluate skips preparing the student once any model is registered.
        if getattr(self._model, "hf_device_map", None) is None and not getattr(self._model, "is_quantized", False):
            self._model.to(device)  # type: ignore[arg-type]
        self._head = find_head(self._model)
        if isinstance(self._head, InseparableHead):
            logger.warning(
                "The teacher (%s) is asked for its logits, which takes more memory: %s.",
                type(self._model).__name__,
                self._head.reason,
            )

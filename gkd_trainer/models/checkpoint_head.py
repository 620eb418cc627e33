"""The head of a causal LM, read from its checkpoint without the rest of the model.

Shapes: V vocabulary, H hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.heads import InseparableHead, SeparableHead, find_head, output_embeddings
from gkd_trainer.models.loading import PLACE
from gkd_trainer.signals import Head

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

_OUTLINE_VOCABULARY = 16
"""Tokens of the model that is built to see how its architecture turns hidden states into logits."""

_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_head(
    name_or_path: str, *, trust_remote_code: bool = False, init_kwargs: Mapping[str, Any] | None = None
) -> Head:
    """Return the head of a checkpoint in safetensors, in the dtype in which it is stored, on the CPU.

    Only its tensors are read (of a name on the hub, only their files are downloaded). A tied head is the input
    embeddings. The scale and soft-cap are those of the config. A model of the same architecture, without layers and
    with random weights, is used to check that nothing else happens between final hidden states and logits.

    Args:
        name_or_path: A folder or a name on the hub.
        trust_remote_code: Whether Python code that comes with it may run.
        init_kwargs: Where it is stored: the options in `PLACE`.

    Raises:
        GKDTeacherError: There is no such checkpoint, its head is quantised or stored in another way, or its
            architecture computes its logits in another way.
    """
    place = dict(init_kwargs or {})
    if unknown := sorted(place.keys() - set(PLACE)):
        raise GKDTeacherError(
            f"only the head of {name_or_path!r} is loaded here, so its options can only say where it is stored "
            f"({', '.join(PLACE)}); got {', '.join(unknown)}: give the others to the server"
        )
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **place)
    except Exception as error:  # from_pretrained and the libraries below it may raise anything
        raise GKDTeacherError(
            f"could not read the config of the teacher {name_or_path!r}: expected the folder or the name on the hub of "
            f"the model that is served ({type(error).__name__}: {error})"
        ) from error
    outline = _outline(config, name_or_path, trust_remote_code)
    head = find_head(outline)
    if isinstance(head, InseparableHead):
        raise GKDTeacherError(
            f"the logits of {name_or_path!r} can't be computed from its final hidden states: {head.reason}. Use a "
            "teacher in this process, or teacher_server_signal='top_k'"
        )
    return _Checkpoint(name_or_path, place).head(outline, head)


def _outline(config: Any, name_or_path: str, trust_remote_code: bool) -> nn.Module:
    """Return a model of the config's architecture and width, without layers and for few tokens, in float32."""
    config = deepcopy(config.get_text_config())
    config.num_hidden_layers, config.vocab_size = 0, _OUTLINE_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(vars(config).get(name), list):
            setattr(config, name, [])
    try:
        # Its weights are random: the global state must not move on.
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # an architecture that does not support it may raise anything
        raise GKDTeacherError(
            f"could not build the architecture of {name_or_path!r} without layers, to see how it computes its logits "
            f"({type(error).__name__}: {error}). Use a teacher in this process, or teacher_server_signal='top_k'"
        ) from error
    return model.eval()


class _Checkpoint:
    """The tensors that a checkpoint stores, by name."""

    def __init__(self, name_or_path: str, place: Mapping[str, Any]) -> None:
        self._name, self._place = name_or_path, place
        index = self._file(_INDEX)
        if index is not None:
            self._file_of: Mapping[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return
        single = self._file(_SINGLE)
        if single is None:
            raise GKDTeacherError(
                f"{name_or_path!r} has neither {_INDEX} nor {_SINGLE}, from which its head could be read: convert it "
                "with save_pretrained"
            )
        with safe_open(single, "pt") as tensors:
            self._file_of = dict.fromkeys(tensors.keys(), _SINGLE)

    def head(self, outline: nn.Module, found: SeparableHead) -> Head:
        """Return the checkpoint's tensors of the head that was found in its outline."""
        module = output_embeddings(outline)
        assert isinstance(module, nn.Linear)
        # A tied head is also named, and stored, as the input embeddings.
        weight_VH = self._tensor(_names_of(outline, module.weight))
        width = module.weight.shape[1]
        if weight_VH.ndim != 2 or weight_VH.shape[1] != width or weight_VH.dtype not in _STORED_DTYPES:
            raise GKDTeacherError(
                f"the head of {self._name!r} must be stored as [V, {width}] in float32, bfloat16 or float16; got "
                f"{weight_VH.dtype} {list(weight_VH.shape)}: name an unquantised checkpoint of the model served"
            )
        bias_V = None if module.bias is None else self._tensor(_names_of(outline, module.bias))
        return Head(weight_VH, bias_V, found.scale, found.softcap)

    def _file(self, name: str) -> str | None:
        found: str | None = cached_file(
            self._name,
            name,
            _raise_exceptions_for_missing_entries=False,
            **{key: value for key, value in self._place.items() if value is not None},
        )
        return found

    def _tensor(self, names: Iterable[str]) -> Tensor:
        """Return the tensor stored under the first of these names, or under one that differs only in its prefix."""
        names = list(names)
        stored = next(filter(None, map(self._stored_name, names)), None)
        if stored is None:
            raise GKDTeacherError(
                f"{self._name!r} stores no {' or '.join(names)}, the head of its architecture: name an unquantised "
                "checkpoint of the model served"
            )
        file = self._file(self._file_of[stored])
        if file is None:
            raise GKDTeacherError(f"{self._name!r} has no file {self._file_of[stored]}, which its index names")
        with safe_open(file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(stored)
        return tensor.clone()  # it may be mapped to the file, which must not change then

    def _stored_name(self, name: str) -> str | None:
        if name in self._file_of:
            return name
        ending = ".".join(name.split(".")[-2:])
        alike = [each for each in self._file_of if each == ending or each.endswith(f".{ending}")]
        return alike[0] if len(alike) == 1 else None


def _names_of(model: nn.Module, parameter: Tensor) -> list[str]:
    return [name for name, each in model.named_parameters(remove_duplicate=False) if each is parameter]

"""The kinds of cached predictions: a teacher's signal at the positions of one row, as bytes and back.

Shapes: P positions of a row, H hidden width, K top tokens, G groups of channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import HiddenSignal, Signal, TopKSignal
from gkd_trainer.teachers.cache.format import Kind, dtype_name, tensor_bytes

Values = tuple[Tensor, ...]
"""The tensors of a signal, each with one entry per position: hidden states, or ids and log-probs."""

_GROUP = 64
"""Channels that share a scale."""


class RowCodec(ABC):
    """Turns the values of a row into bytes and back."""

    item_size: int
    """Bytes of each number in the encoded row."""

    @abstractmethod
    def encode(self, values: Values) -> bytes:
        """Return the values as bytes; raise ValueError, with the reason, for values that have no such form."""

    @abstractmethod
    def decode(self, content: bytes, count: int) -> Values:
        """Return the values at `count` positions; raise ValueError if the bytes do not fit them."""


@dataclass(frozen=True)
class HalfHidden(RowCodec):
    """Hidden states in bfloat16 or float16, unchanged."""

    dtype: torch.dtype
    width: int
    item_size = 2

    def encode(self, values: Values) -> bytes:
        """Return the hidden states [P, H] as bytes."""
        [hidden_PH] = values
        _require_finite(hidden_PH)
        return bytes(tensor_bytes(hidden_PH.to(self.dtype)))

    def decode(self, content: bytes, count: int) -> Values:
        """Return the hidden states [P, H]."""
        items = np.frombuffer(bytearray(content), np.int16).reshape(count, self.width)
        return (torch.from_numpy(items).view(self.dtype),)


@dataclass(frozen=True, eq=False)
class IntegerHidden(RowCodec):
    """Hidden states as integers of `item_size` (1 or 2) bytes; each 64 standardised channels share a scale.

    In 2 bytes the gradient's error is a tenth of float16's, which keeps 11 bits of a number however large it is.
    """

    dtype: torch.dtype
    mean_H: Tensor
    std_H: Tensor
    item_size: int

    def encode(self, values: Values) -> bytes:
        """Return the hidden states [P, H] as bytes: the scales in float16, then the integers."""
        [hidden_PH] = values
        _require_finite(hidden_PH)
        z_PH = (hidden_PH.float() - self.mean_H) / self.std_H
        z_PGC = torch.nn.functional.pad(z_PH, (0, -len(self.mean_H) % _GROUP)).unflatten(1, (-1, _GROUP))
        # Rounded up, so that no integer exceeds its range; not 0, by which nothing can be divided.
        scale_PG = np.nextafter((z_PGC.abs().amax(dim=2) / self._largest).half().numpy(), np.float16(np.inf))
        if not np.isfinite(scale_PG).all():
            raise ValueError("hidden states are too far from those of the first rows")
        integers_PGC = (z_PGC / torch.from_numpy(scale_PG).float()[..., None]).round()
        integers_PH = integers_PGC.flatten(1)[:, : len(self.mean_H)].numpy().astype(self._integer)
        return bytes(scale_PG.tobytes() + integers_PH.tobytes())

    def decode(self, content: bytes, count: int) -> Values:
        """Return the hidden states [P, H] in the teacher's dtype."""
        width = len(self.mean_H)
        groups = -(-width // _GROUP)
        scales, integers = content[: count * groups * 2], content[count * groups * 2 :]
        scale_PG = torch.from_numpy(np.frombuffer(scales, np.float16).reshape(count, groups).astype(np.float32))
        z_PH = torch.from_numpy(np.frombuffer(integers, self._integer).reshape(count, width).astype(np.float32))
        z_PH *= scale_PG.repeat_interleave(_GROUP, dim=1)[:, :width]
        return ((z_PH * self.std_H + self.mean_H).to(self.dtype),)

    @property
    def _integer(self) -> np.dtype[np.signedinteger[Any]]:
        return np.dtype(f"i{self.item_size}")

    @property
    def _largest(self) -> int:
        return int(np.iinfo(self._integer).max)


@dataclass(frozen=True)
class TopK(RowCodec):
    """The ids of the top tokens, in 16 bits if they fit, and their log-probs in float32: all as the teacher gave them.

    16 bits for the log-probs could raise the mass of the top tokens above 1, or hide a small tail.
    """

    width: int
    has_wide_ids: bool
    item_size = 2

    def encode(self, values: Values) -> bytes:
        """Return the ids and log-probs [P, K] as bytes."""
        ids_PK, log_p_PK = values
        if log_p_PK.isnan().any():
            raise ValueError("log-probs are not numbers")
        # The ids of absent entries are meaningless, and may be anything.
        ids_PK = ids_PK.masked_fill(log_p_PK == -torch.inf, 0)
        return ids_PK.numpy().astype(self._id_type).tobytes() + bytes(tensor_bytes(log_p_PK.float()))

    def decode(self, content: bytes, count: int) -> Values:
        """Return the ids, in int64, and the log-probs [P, K]."""
        size = count * self.width * self._id_type.itemsize
        ids_PK = np.frombuffer(content[:size], self._id_type).reshape(count, self.width)
        log_p_PK = np.frombuffer(bytearray(content[size:]), np.float32).reshape(count, self.width)
        return torch.from_numpy(ids_PK.astype(np.int64)), torch.from_numpy(log_p_PK)

    @property
    def _id_type(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint32 if self.has_wide_ids else np.uint16)


def values_of(signal: Signal, kind: Kind) -> Values:
    """Return the tensors of a signal that a kind stores, on the CPU.

    Raises GKDTeacherError if the signal does not have them.
    """
    if kind == "topk" and isinstance(signal, TopKSignal):
        return signal.ids_NK.cpu(), signal.log_p_NK.cpu()
    if kind != "topk" and isinstance(signal, HiddenSignal):
        return (signal.hidden_NH.cpu(),)
    came = {HiddenSignal: "final hidden states", TopKSignal: "its top tokens"}.get(type(signal), "full logits")
    expected = "its top tokens" if kind == "topk" else "final hidden states and a head"
    remedy = "set teacher_top_k" if kind == "topk" else "use kind='topk' with teacher_top_k"
    raise GKDTeacherError(f"kind={kind!r} stores {expected}, but the teacher gives {came}: {remedy}")


def channel_statistics(rows: list[Values]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel [H] of rows of hidden states, in float32."""
    hidden_NH = torch.cat([hidden_PH for (hidden_PH,) in rows]).double()
    std_H = hidden_NH.std(dim=0, correction=0)
    # A constant channel has nothing to scale.
    return hidden_NH.mean(dim=0).float(), torch.where(std_H > 0, std_H, 1.0).float()


def dtype_of(values: Values, kind: Kind) -> str:
    """Return the name of the dtype in which values of a kind are read again."""
    return "float32" if kind == "topk" else dtype_name(values[0].dtype)


def is_half(dtype: str) -> bool:
    """Return whether a dtype is one of 16 bits."""
    return dtype in ("bfloat16", "float16")


def _require_finite(hidden_PH: Tensor) -> None:
    if not hidden_PH.isfinite().all():
        raise ValueError("hidden states are not finite")

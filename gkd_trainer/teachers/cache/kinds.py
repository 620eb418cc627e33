"""The kinds of cached predictions: a teacher's signal at the positions of one row, as bytes and back.

Shapes: P positions of a row, H hidden width, K top tokens, G groups of channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.signals import HiddenSignal, Signal, TopKSignal
from gkd_trainer.teachers.cache.format import Kind, dtype_name, tensor_bytes

Values = tuple[Tensor, ...]
"""The tensors of a signal, each with one entry per position: hidden states, or ids and log-probs."""

_GROUP = 64
"""Channels that share a scale in hidden_int8."""

_STEPS = 127
"""Steps of hidden_int8 on each side of zero."""


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
class Hidden(RowCodec):
    """Hidden states in 16 bits: bfloat16 and float16 unchanged, float32 rounded to float16."""

    dtype: torch.dtype
    width: int
    item_size = 2

    def encode(self, values: Values) -> bytes:
        """Return the hidden states [P, H] as bytes."""
        [hidden_PH] = values
        stored_PH = hidden_PH.to(self._stored_dtype)
        if not stored_PH.isfinite().all():
            reason = "are beyond the range of float16, which stores those of a float32 teacher (±65504)"
            raise ValueError(f"hidden states {reason if hidden_PH.isfinite().all() else 'are not finite'}")
        return bytes(tensor_bytes(stored_PH))

    def decode(self, content: bytes, count: int) -> Values:
        """Return the hidden states [P, H] in the teacher's dtype."""
        items = np.frombuffer(bytearray(content), np.int16).reshape(count, self.width)
        return (torch.from_numpy(items).view(self._stored_dtype).to(self.dtype),)

    @property
    def _stored_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16


@dataclass(frozen=True, eq=False)
class HiddenInt8(RowCodec):
    """Hidden states in 8 bits: channels are standardised, and each 64 of a position share a float16 scale."""

    dtype: torch.dtype
    mean_H: Tensor
    std_H: Tensor
    item_size = 1

    def encode(self, values: Values) -> bytes:
        """Return the hidden states [P, H] as bytes."""
        [hidden_PH] = values
        if not hidden_PH.isfinite().all():
            raise ValueError("hidden states are not finite")
        z_PH = (hidden_PH.float() - self.mean_H) / self.std_H
        z_PGC = torch.nn.functional.pad(z_PH, (0, -len(self.mean_H) % _GROUP)).unflatten(1, (-1, _GROUP))
        scale_PG = (z_PGC.abs().amax(dim=2) / _STEPS).half()
        # Rounded up, so that no code exceeds its range; not 0, by which nothing can be divided.
        scale_PG = torch.nextafter(scale_PG, torch.full_like(scale_PG, torch.inf))
        if not scale_PG.isfinite().all():
            raise ValueError("hidden states are too far from those of the first rows for 8 bits")
        codes_PH = (z_PGC / scale_PG.float()[..., None]).round().to(torch.int8).flatten(1)[:, : len(self.mean_H)]
        return bytes(tensor_bytes(scale_PG)) + bytes(tensor_bytes(codes_PH))

    def decode(self, content: bytes, count: int) -> Values:
        """Return the hidden states [P, H] in the teacher's dtype."""
        width = len(self.mean_H)
        groups = -(-width // _GROUP)
        scales, codes = content[: count * groups * 2], content[count * groups * 2 :]
        scale_PG = torch.from_numpy(np.frombuffer(bytearray(scales), np.float16).reshape(count, groups))
        codes_PH = torch.from_numpy(np.frombuffer(bytearray(codes), np.int8).reshape(count, width))
        scale_PH = scale_PG.float().repeat_interleave(_GROUP, dim=1)[:, :width]
        return ((codes_PH * scale_PH * self.std_H + self.mean_H).to(self.dtype),)


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

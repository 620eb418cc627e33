"""Lossless compression of rows: bytes of equal significance together, then zstd."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Literal

import numpy as np

from gkd_trainer.errors import GKDConfigError

Compression = Literal["none", "zstd"]

_LEVEL = 1
"""Higher levels take five times as long to save less than 1 % more of hidden states."""

_LENGTH_BYTES = 4


def is_available() -> bool:
    """Return whether the package for zstd is installed."""
    return importlib.util.find_spec("zstandard") is not None


def require() -> None:
    """Raise GKDConfigError if the package for zstd is not installed."""
    _zstandard()


def compress(content: bytes, item_size: int, compression: Compression) -> bytes:
    """Return bytes compressed; `item_size` is the number of bytes of each number in them.

    Raises GKDConfigError if the package for zstd is not installed.
    """
    if compression == "none":
        return content
    compressor = _zstandard().ZstdCompressor(level=_LEVEL)
    planes = np.frombuffer(content, np.uint8).reshape(-1, item_size).T
    # Apart: in one frame, short rows would share one code for bytes that are distributed differently.
    frames = [compressor.compress(plane.tobytes()) for plane in planes]
    return b"".join([*(len(frame).to_bytes(_LENGTH_BYTES, "little") for frame in frames), *frames])


def decompress(content: bytes, item_size: int, compression: Compression) -> bytes:
    """Return the bytes that `compress` was given."""
    if compression == "none":
        return content
    decompressor, planes, start = _zstandard().ZstdDecompressor(), [], item_size * _LENGTH_BYTES
    for index in range(item_size):
        place = index * _LENGTH_BYTES
        end = start + int.from_bytes(content[place : place + _LENGTH_BYTES], "little")
        planes.append(np.frombuffer(decompressor.decompress(content[start:end]), np.uint8))
        start = end
    return np.stack(planes, axis=1).tobytes()


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise GKDConfigError(
            "compression='zstd' needs the package zstandard: pip install zstandard (the extra [cache] of a clone)"
        ) from error
    return zstandard

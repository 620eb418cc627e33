"""Lossless compression of rows: bytes of equal significance together, then zstd."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import numpy as np

from gkd_trainer.errors import GKDConfigError

Compression = Literal["none", "zstd"]

_LEVEL = 1
"""Higher levels take five times as long to save less than 1 % more of hidden states."""


def is_available() -> bool:
    """Return whether the package for zstd is installed."""
    try:
        _zstandard()
    except GKDConfigError:
        return False
    return True


def compress(content: bytes, item_size: int, compression: Compression) -> bytes:
    """Return bytes compressed; `item_size` is the number of bytes of each number in them.

    Raises GKDConfigError if the package for zstd is not installed.
    """
    if compression == "none":
        return content
    planes = np.frombuffer(content, np.uint8).reshape(-1, item_size).T.tobytes()
    compressed: bytes = _zstandard().ZstdCompressor(level=_LEVEL).compress(planes)
    return compressed


def decompress(content: bytes, item_size: int, compression: Compression) -> bytes:
    """Return the bytes that `compress` was given."""
    if compression == "none":
        return content
    planes = _zstandard().ZstdDecompressor().decompress(content)
    return np.frombuffer(planes, np.uint8).reshape(item_size, -1).T.tobytes()


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise GKDConfigError(
            "compression='zstd' needs the package zstandard: pip install zstandard (the extra [cache] of a clone)"
        ) from error
    return zstandard

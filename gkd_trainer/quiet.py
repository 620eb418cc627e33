"""Imports without hints on what is not in use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import what the block imports without the hint of bitsandbytes that the `kernels` package is missing.

    PEFT imports bitsandbytes wherever it is installed. On some CPUs that looks for a faster kernel of 4-bit layers, and
    warns that there is none, whether or not a model has such layers.
    """
    hints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hints.addFilter(_is_no_hint)
    try:
        yield
    finally:
        hints.removeFilter(_is_no_hint)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")

"""Imports without another library's hints about features that are not used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence, inside the block, bitsandbytes' hint that the `kernels` package is missing.

    PEFT imports bitsandbytes if it is installed. On some CPUs, bitsandbytes then looks for a faster kernel for 4-bit
    layers and warns that there is none, whether or not a model has such layers.
    """
    hints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hints.addFilter(_is_no_hint)
    try:
        yield
    finally:
        hints.removeFilter(_is_no_hint)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")

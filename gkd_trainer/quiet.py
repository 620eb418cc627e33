"""Another library's hints that are wrong here, left out."""

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
    with _without("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"):
        yield


@contextmanager
def quiet_padding() -> Iterator[None]:
    """Silence, inside the block, the warning of `generate` that prompts are padded on the right.

    transformers 5.0 takes a prompt that ends with the pad token, which often is eos, for one that is padded so.
    """
    with _without("transformers.generation.utils", "A decoder-only architecture is being used, but right-padding"):
        yield


@contextmanager
def _without(logger: str, beginning: str) -> Iterator[None]:
    """Leave out the messages of a logger that begin so, inside the block."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    hints = logging.getLogger(logger)
    hints.addFilter(is_other)
    try:
        yield
    finally:
        hints.removeFilter(is_other)

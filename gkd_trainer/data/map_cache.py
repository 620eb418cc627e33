"""The files in which `datasets` keeps what `map` returns: rows are prepared once, and again by other code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import Hasher
from filelock import FileLock, Timeout

from gkd_trainer import __version__

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 1800
"""Seconds to wait for another process. What it started may hold the lock though it was killed, and where files can't be
locked, a file that it left."""


@cache
def code_version() -> tuple[str, ...]:
    """Return what changes with the code that turns rows into tokens: ours, and that of the libraries that render.

    The cache knows a function by its name and state. If this is part of the state, rows prepared by other code are not
    found.
    """
    package = Path(__file__).parents[1]
    sources = sha256()  # Installs from a repository share a version.
    for file in sorted([*package.glob("data/*.py"), *package.glob("models/*.py")]):
        sources.update(file.read_bytes())
    libraries = [f"{name} {version(name)}" for name in ("jinja2", "tokenizers", "transformers", "trl")]
    return (__version__, sources.hexdigest(), *libraries)


@contextmanager
def one_process_at_a_time(dataset: Dataset, function: Callable[..., Any]) -> Iterator[None]:
    """Lock the mapping of a dataset by a function: of the ranks of a machine, one does it, and the others find it done.

    A lock lets a rank come late, or never, where a barrier would wait for it until the exchange times out. Who waits
    for too long works alone. A dataset in memory is not locked: its results are not kept.
    """
    with ExitStack() as stack:
        if dataset.cache_files and is_caching_enabled():
            with suppress(Exception):  # A function that can't be hashed, a file system without locks: each works alone.
                name = Hasher.hash((dataset._fingerprint, function))
                lock = FileLock(Path(dataset.cache_files[0]["filename"]).with_name(f"gkd-{name}.lock"))
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    logger.warning(
                        "Waiting until another process has prepared the same rows, for %d minutes at most (%s)",
                        _LONGEST_WAIT // 60,
                        lock.lock_file,
                    )
                    lock.acquire(timeout=_LONGEST_WAIT)
                stack.callback(lock.release)
        yield

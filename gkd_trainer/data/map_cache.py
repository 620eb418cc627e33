"""The files in which `datasets` keeps what `map` returns: rows are prepared once, and again by other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import Hasher
from filelock import FileLock

from gkd_trainer import __version__


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

    A lock lets a rank come late, or never, where a barrier would wait for it until the exchange times out. A dataset
    in memory is not locked: its results are not kept.
    """
    with ExitStack() as stack:
        if dataset.cache_files and is_caching_enabled():
            with suppress(Exception):  # A function that can't be hashed, a file system without locks: each works alone.
                name = Hasher.hash((dataset._fingerprint, function))
                stack.enter_context(FileLock(Path(dataset.cache_files[0]["filename"]).with_name(f"gkd-{name}.lock")))
        yield

"""Compression loses nothing, and needs its package."""

import sys

import numpy as np
import pytest

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.teachers.cache import compression


@pytest.mark.parametrize("method", ["none", "zstd"])
@pytest.mark.parametrize("item_size", [1, 2])
@pytest.mark.parametrize("count", [0, 2, 1000])
def test_bytes_come_back_unchanged(method, item_size, count):
    content = np.random.default_rng(0).normal(size=count).astype(np.float16).tobytes()
    assert compression.decompress(compression.compress(content, item_size, method), item_size, method) == content


def test_bytes_of_equal_significance_compress_better_together():
    content = np.random.default_rng(0).normal(size=10_000).astype(np.float16).tobytes()
    together = compression.compress(content, 2, "zstd")
    assert len(together) < 0.95 * len(content)
    assert len(together) < len(compression.compress(content, 1, "zstd"))


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(GKDConfigError, match="needs the package zstandard: pip install zstandard"):
        compression.require()

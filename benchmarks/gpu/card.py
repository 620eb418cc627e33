"""What a card is and what it can do: its description, copy bandwidth and rate of matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.clocks import median_seconds
from gkd_trainer.divergence.rows import runs_in_triton

if TYPE_CHECKING:
    from benchmarks.gpu.cells import Where

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "liger-kernel", "vllm")


def description(where: Where) -> dict[str, Any]:
    """Return the card, its driver, and the versions that the results belong to; None for what is not there.

    `has_kernels` tells whether the divergence is computed by Triton's kernels; without them, its figures are others.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    about: dict[str, Any] = {
        "card": platform.processor() or platform.machine(),
        "driver": None if driver is None else driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "versions": {name: _version(name) for name in PACKAGES},
        "processors": len(os.sched_getaffinity(0)),
    }
    if where.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "card": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": f"sm_{properties.major}{properties.minor}",
            "has_kernels": runs_in_triton(torch.empty(1, 1, device=where.torch_device)),
        }
    return about


def copy_bandwidth(where: Where) -> dict[str, Any]:
    """Return the bytes read and written per second by a copy from the device's memory to itself."""
    n_bytes = where.pick(2**32, 2**20)
    source = torch.empty(n_bytes // 4, device=where.torch_device).normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), where.torch_device, turns=10)
    return {"seconds": seconds, "bytes_per_second": 2 * n_bytes / seconds}


def product_rate(where: Where, M: int, K: int, N: int) -> dict[str, Any]:
    """Return the operations per second of a product [M, K]·[K, N] of random bfloat16 matrices."""
    left_MK, right_KN = (
        torch.randn(shape, device=where.torch_device, dtype=torch.bfloat16) for shape in ((M, K), (K, N))
    )
    seconds = median_seconds(lambda: left_MK @ right_KN, where.torch_device, turns=10)
    return {"seconds": seconds, "operations_per_second": 2 * M * K * N / seconds}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip() or None

"""Time and memory of a device: CUDA's events and its allocator's counts, or this process's clock and resident set."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Memory:
    """Bytes in use before a piece of work and at its peak; both are 0 until the work is done."""

    before: int = 0
    peak: int = 0

    @property
    def added(self) -> int:
        """The part of the peak that came with the work."""
        return self.peak - self.before


@contextmanager
def measured_memory(device: torch.device) -> Iterator[Memory]:
    """Yield the memory of the `with` body, known at its end: of torch's tensors on CUDA, else of the whole process."""
    memory = Memory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device)
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device)
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        memory.before = _status_bytes("VmRSS")
        yield memory
        memory.peak = _status_bytes("VmHWM")


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes: on CUDA its work on the device, between two events."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def median_seconds(call: Callable[[], object], device: torch.device, turns: int) -> float:
    """Return the median of some turns, after one that is not counted."""
    call()
    return statistics.median(seconds_of(call, device) for _ in range(turns))


def median_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Return the median of the ratios in each turn; the longer sequence is cut."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=False))


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024

"""Time and memory of a device."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.clocks import measured_memory, median_ratio, median_seconds, seconds_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SIZE = 2**26


MEASURE = f"""
import torch
from benchmarks.clocks import measured_memory
kept = torch.ones({SIZE // 4}, device=DEVICE)
with measured_memory(torch.device(DEVICE)) as memory:
    added = torch.ones({SIZE // 4}, device=DEVICE)
    del added
print(memory.before, memory.added)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_peak_has_what_is_free_again_at_the_end_and_not_what_was_there(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # In a process of its own: one that has run much reuses memory that it never gave back.
    command = [sys.executable, "-c", f"DEVICE = {device!r}{MEASURE}"]
    before, added = map(int, subprocess.check_output(command, cwd=ROOT).split())
    assert before >= SIZE
    assert 0.9 * SIZE <= added <= 1.5 * SIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_seconds_are_those_of_the_device():
    assert seconds_of(lambda: torch.cuda._sleep(1_000_000_000), torch.device("cuda")) > 0.2


def test_on_cuda_time_is_read_between_events_and_memory_from_the_allocator(monkeypatch):
    """With counters in place of a card, since the code must be right before it meets one."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 170)
    cuda = torch.device("cuda")
    assert seconds_of(lambda: calls.append("call"), cuda) == 0.25
    assert calls == ["record", "call", "record", "synchronize"]
    calls.clear()
    with measured_memory(cuda) as memory:
        calls.append("call")
    assert (memory.before, memory.peak, memory.added) == (100, 170, 70)
    assert calls == ["wait", "reset", "call", "wait"]


def test_seconds_are_the_median_of_the_turns_after_the_first():
    turns = iter([0.3, 0.0, 0.05, 0.0])
    assert median_seconds(lambda: time.sleep(next(turns)), CPU, turns=3) < 0.04
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 1


def test_ratios_are_of_the_same_turn_and_a_contender_with_fewer_turns_is_compared_in_those():
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
    assert median_ratio([2.0, 9.0], [1.0, 3.0, 100.0]) == 2.5

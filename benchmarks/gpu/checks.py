"""The stage `checks`: what the card can do, the tests marked `gpu`, and a sanitizer's search for memory errors.

Shapes: N tokens, V vocabulary, H hidden width, K top tokens.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from benchmarks.gpu.card import copy_bandwidth, product_rate
from benchmarks.gpu.cells import Cell, NotMeasuredError, Where
from gkd_trainer.divergence import token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.signals import Head, HiddenSignal, Signal, TopKSignal

ROOT = Path(__file__).parents[2]

TOOLS = ("memcheck", "racecheck")
"""compute-sanitizer's tools: accesses outside of allocations, and races in shared memory."""

_MARKED_GPU = re.compile(r"^\s*@pytest\.mark\.gpu\b|\bmarks=.*\bmark\.gpu\b", re.MULTILINE)

_WITH_FIXTURES = ("tests/teachers/", "tests/trainer/")
"""Folders whose tests marked `gpu` take fixtures of conftest.py, and packages that a machine for GPUs may lack.

All others run without conftest.py, with torch, Triton, transformers and pytest: that they don't run is a failure.
"""

_SECONDS = 20
"""About how long a file's tests take."""

_SECONDS_OF_KERNELS = 90
"""The same if they compile kernels, some hundred variants."""

_LONGEST_SANITIZER = 110
"""Seconds after which a tool, which slows all kernels down, is stopped."""

_SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def cells(where: Where) -> list[Cell]:
    """Return the cells of the stage, the card's own figures first."""
    sizes = where.pick([(8192, 8192, 8192), (8192, 4096, 151936), (8192, 896, 151936)], [(8, 8, 8)])
    files = files_with_gpu_tests()
    return [
        Cell("copy", copy_bandwidth, 5),
        *(Cell("product", product_rate, 5, {"M": M, "K": K, "N": N}) for M, K, N in sizes),
        *(
            Cell("tests", run_tests, _SECONDS_OF_KERNELS if "test_triton" in file else _SECONDS, {"file": file})
            for file in where.pick(files, files[:1])
        ),
        *(Cell("sanitizer", sanitize, 60, {"tool": tool}) for tool in where.pick(TOOLS, TOOLS[:1])),
    ]


def files_with_gpu_tests() -> list[str]:
    """Return the test files with tests that are marked `gpu`, relative to the repository."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if _MARKED_GPU.search(file.read_text("utf-8"))]


def run_tests(where: Where, file: str) -> dict[str, Any]:
    """Run a file's tests marked `gpu`; return how many passed, failed and were skipped, and why some failed.

    Raises:
        NotMeasuredError: No test of a teacher or of whole steps ran, since a package or a second GPU is missing.
        RuntimeError: No test ran, for any other reason.
    """
    for package in ("pytest", "pytest_timeout"):
        if find_spec(package) is None:
            _raise_not_run(file, f"not installed: {package}")
    options = () if file.startswith(_WITH_FIXTURES) else ("--noconftest",)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options, f"--junitxml={report}", file]
        done = _run(command)
        # A file that can't be imported is a test with an error, whose class has no name.
        tests = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
        if not any(test.get("classname") for test in tests):
            if missing := re.search(r"^E +ModuleNotFoundError: No module named '([\w.]+)", done.stdout, re.M):
                _raise_not_run(file, f"not installed: {missing[1]}")
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    failures = [
        f"{test.get('name')}: {reason}"
        for test in tests
        for found in [test.find("failure") if test.find("failure") is not None else test.find("error")]
        if found is not None
        for reason in _reasons(found)
    ]
    skipped = [found.get("message") for test in tests if (found := test.find("skipped")) is not None]
    if where.device == "cuda" and len(skipped) == len(tests):
        _raise_not_run(file, f"all of its tests were skipped: {skipped[0]}")
    n_failed = sum(test.find(kind) is not None for test in tests for kind in ("failure", "error"))
    return {
        "passed": len(tests) - len(skipped) - n_failed,
        "failed": n_failed,
        "skipped": len(skipped),
        "failures": failures,
    }


def _raise_not_run(file: str, why: str) -> NoReturn:
    if file.startswith(_WITH_FIXTURES):
        raise NotMeasuredError(why)
    raise RuntimeError(f"these tests must run; {why}")


def _reasons(found: ElementTree.Element) -> list[str]:
    """Return why a test failed, in a line: or, if it ran tests in a process of its own, which of these failed."""
    inner = re.findall(r"^E? *((?:FAILED|ERROR) \S+::.*)", found.text or "", re.MULTILINE)
    return [line[:300] for line in inner or [(found.get("message") or found.tag).splitlines()[0]]]


def sanitize(where: Where, tool: str) -> dict[str, Any]:
    """Run `exercise` under a tool of compute-sanitizer; return the errors that it found. On a CPU, without the tool."""
    command = [sys.executable, "-c", f"from benchmarks.gpu.checks import exercise; exercise({where.device!r})"]
    if where.device == "cuda":
        sanitizer = next((path for path in map(shutil.which, _SANITIZERS) if path is not None), None)
        if sanitizer is None:
            raise NotMeasuredError("compute-sanitizer is not installed: it comes with CUDA's toolkit")
        # torch asks the driver for functions that it may lack: such calls fail, and are no errors of ours.
        options = ["--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
        command = [sanitizer, *options, *command]
    try:
        # Without torch's cache each tensor is an allocation of its own, whose end the tool knows.
        done = _run(command, timeout=_LONGEST_SANITIZER, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"it did not finish in {_LONGEST_SANITIZER} s") from None
    if "Device not supported" in done.stdout:
        raise NotMeasuredError("compute-sanitizer does not support this device, or what it runs under")
    if done.returncode not in (0, 99):
        raise RuntimeError(f"the command ended with {done.returncode}: {done.stdout[-500:]}")
    lines = [line.removeprefix("=" * 9).strip() for line in done.stdout.splitlines() if line.startswith("=" * 9)]
    found = [line for line in lines if line and line != "COMPUTE-SANITIZER"]
    return {"failed": int(done.returncode == 99), "found": found[:20]}


def exercise(device: str) -> None:
    """Compute the loss and its gradient at odd sizes, for each divergence and kind of teacher."""
    torch.manual_seed(0)
    for N, V, H in ((1, 5, 8), (7, 150, 16), (5, 4099, 24)):
        for options in _options():
            for teacher in _teachers(N, V, H, device, is_top_k_taken=options.get("divergence", "jsd") == "jsd"):
                student = HiddenSignal(
                    torch.randn(N, H, device=device, dtype=torch.bfloat16, requires_grad=True),
                    Head(torch.randn(V, H, device=device, dtype=torch.bfloat16, requires_grad=True)),
                )
                labels_N = torch.randint(V, (N,), device=device)
                result = token_divergence(student, teacher, labels_N=labels_N, **options)
                assert result.cross_entropy_N is not None
                (result.values_N + result.cross_entropy_N).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _options() -> Iterator[dict[str, Any]]:
    for beta in (0.0, 0.5, 1.0):
        yield {"beta": beta}
    for name in sorted(DIVERGENCES.keys() - {"jsd"}):
        yield {"divergence": name}


def _teachers(N: int, V: int, H: int, device: str, *, is_top_k_taken: bool) -> Iterator[Signal]:
    weight_VH = torch.randn(V, H, device=device, dtype=torch.bfloat16)
    yield HiddenSignal(torch.randn(N, H, device=device, dtype=torch.bfloat16), Head(weight_VH))
    if is_top_k_taken:
        log_p_NK, ids_NK = torch.randn(N, V, device=device).log_softmax(dim=1).topk(min(V, 3))
        yield TopKSignal(ids_NK, log_p_NK, V)


def _run(command: list[str], timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # With what it started, which would go on using the card beside the next cells.
            started = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *started):
                each.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)

"""Triton's kernels: always in its interpreter, on a GPU if there is one, and compiled for a GPU that is not there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = [str(Path(__file__).with_name(name)) for name in ("triton_cases.py", "test_layouts.py")]

# Without conftest.py, whose imports the kernels do without; of the other engines, test_layouts.py has been run already.
PYTEST = ("-m", "pytest", "-q", "--noconftest", "-k", "triton", *CASES)

# Each of some hundred variants takes a second to compile. pytest-benchmark would warn of the processes.
PARALLEL = ("-n", str(min(8, os.cpu_count() or 1)), "-p", "no:benchmark") if find_spec("xdist") else ()

COMPILE = r"""
import re
import warnings
from benchmarks.gpu.costs import compile_kernel
from gkd_trainer.divergence.triton import KINDS, LAUNCH

warnings.simplefilter("error")
threads = 32 * LAUNCH["num_warps"]
variants = [(kind, has_labels, "*bf16", 1) for kind in sorted(KINDS) for has_labels in (False, True)]
variants += [("jsd", True, "*fp32", 2)]
for capability in (80, 90):
    for kind, has_labels, gradient_type, stores in variants:
        kernel = compile_kernel(kind, capability, has_labels=has_labels, gradient_type=gradient_type)
        what = (capability, kind, has_labels, gradient_type, kernel)
        assert kernel.registers * threads * 2 <= 65_536, what
        assert kernel.spilled == 0, what
        passes = 2 if kind in ("forward_kl", "reverse_kl") else 3
        assert len(kernel.instructions) == passes, what
        assert kernel.vector_accesses == passes * 4 + stores, what
    for kind in sorted(KINDS):
        # Several threads have each logit of a row shorter than the program: all read it before one overwrites it.
        ptx = compile_kernel(kind, capability, gradient_type="*fp32", chunk=64).ptx
        after_the_last_load = ptx.rpartition("ld.global")[2]
        assert re.search(r"bar\.sync|st\.global", after_the_last_load)[0] == "bar.sync", (capability, kind)
"""


def run(*command, **environment):
    root = str(Path(__file__).parents[2])
    # Before the packages that `benchmarks.gpu --wheels` put there, pytest for example.
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_are_right_in_tritons_interpreter():
    # A process of its own: the variable has to be there before Triton is imported. Its NumPy warns of inf - inf.
    run(*PYTEST, "-W", "ignore", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_right_on_a_gpu():
    run(*PYTEST, *PARALLEL)


def test_two_programs_fit_on_a_multiprocessor_without_spills_and_read_16_bytes_at_once():
    # Per pass and thread, two loads for the eight logits of each side; one store for eight halves, or two for floats.
    run("-W", "error", "-c", COMPILE)


def test_processes_of_their_own_find_packages_that_were_carried_along(tmp_path, monkeypatch):
    (tmp_path / "carried_package.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run("-c", "import carried_package, gkd_trainer")

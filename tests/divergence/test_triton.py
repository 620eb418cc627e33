"""Triton's kernels: always in its interpreter, on a GPU if there is one, and compiled for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = [str(Path(__file__).with_name(name)) for name in ("triton_cases.py", "test_layouts.py")]

# Without conftest.py, whose imports the kernels do without; of the other engines, test_layouts.py has been run already.
PYTEST = ("-m", "pytest", "-q", "--noconftest", "-k", "triton", *CASES)

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gkd_trainer.divergence import triton as kernels

kernel = kernels._compare_kernel
signature = {
    name: "*i64" if name == "labels_ptr" else "*fp32" if name.endswith("_ptr")
    else "i32" if name in ("student_stride", "teacher_stride", "V")
    else "constexpr" if name.isupper() else "fp32"
    for name in kernel.arg_names
}
for kind in sorted(kernels.KINDS):
    constants = {name: True for name in kernel.arg_names if name.isupper()} | {"KIND": kind, "CHUNK": 1024}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=kernels.LAUNCH)
    assert "ptx" in compiled.asm, kind
"""


def run(*command, **environment):
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root} | environment
    done = subprocess.run([sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_are_right_in_tritons_interpreter():
    # A process of its own: the variable has to be there before Triton is imported. Its NumPy warns of inf - inf.
    run(*PYTEST, "-W", "ignore", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_right_on_a_gpu():
    run(*PYTEST)


def test_the_kernels_compile_without_a_warning_for_a_gpu_that_is_not_here():
    run("-W", "error", "-c", COMPILE)

"""Triton's kernels of top-k: always in its interpreter, on a GPU if there is one, and compiled for GPUs not there."""

from pathlib import Path

import pytest
import torch

from tests.divergence.test_triton import PARALLEL, run

pytest.importorskip("triton")

# Without conftest.py, whose imports the kernels do without.
PYTEST = ("-m", "pytest", "-q", "--noconftest", str(Path(__file__).with_name("triton_topk_cases.py")))

COMPILE = r"""
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from gkd_trainer.divergence import triton_topk as kernels

TYPES = {"student_stride": "i32", "gradient_stride": "i32", "V": "i32", "K": "i32", "max_mass": "fp32"}
TYPES |= {"per_softcap": "fp32", "is_teacher_finite_ptr": "*i1", "agrees_ptr": "*i1"}
TYPES |= dict.fromkeys(["ids_ptr", "sorted_ids_ptr", "order_ptr", "labels_ptr"], "*i64")


def compiled(kernel, capability, gradient_type="*fp32", **constants):
    types = TYPES | {"gradient_ptr": gradient_type}
    constants.setdefault("CHUNK", kernels.CHUNK)
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names
    }
    # Pointers and the strides of padded rows are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_stride"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.LAUNCH)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


def assert_lean(binary, *, vectors):
    used = resources(binary.asm["cubin"])
    # Three programs of 256 threads share the 65,536 registers of a multiprocessor.
    assert used["REG"] <= 80 and used["STACK"] == used["LOCAL"] == 0, used
    assert all(re.search(vector, binary.asm["ptx"]) for vector in vectors), vectors
    assert "convert_layout" not in binary.asm["ttgir"]


for capability in (80, 90):
    for top_k in (1, 64, kernels.MAX_TOP_K):
        for has_labels in (False, True):
            options = {"HAS_BUCKET": has_labels, "HAS_LABELS": has_labels, "BLOCK_K": top_k}
            options |= {"K": 1} if top_k == 1 else {}  # a one becomes a constant
            binary = compiled(kernels._categories_kernel, capability, **options)
            assert_lean(binary, vectors=[r"ld\.global\.v4\.b32"])
    for gradient_type in ("*fp32", "*bf16", "*fp16"):
        for has_all in (False, True):
            options = {"HAS_BUCKET": has_all, "HAS_LABEL_WEIGHT": has_all, "IS_CAPPED": has_all}
            binary = compiled(kernels._gradient_kernel, capability, gradient_type, **options)
            store = r"st\.global\.v4\.b32" if gradient_type == "*fp32" else r"st\.global\.v[24]\.b32"
            assert_lean(binary, vectors=[r"ld\.global\.v4\.b32", store])
    # Several threads have each logit of a row that is shorter than the program: all read it before one overwrites it.
    options = {"HAS_BUCKET": False, "HAS_LABEL_WEIGHT": False, "IS_CAPPED": False, "CHUNK": 64}
    ptx = compiled(kernels._gradient_kernel, capability, **options).asm["ptx"]
    after_the_last_load = ptx.rpartition("ld.global")[2]
    assert re.search(r"bar\.sync|st\.global", after_the_last_load)[0] == "bar.sync"
"""


def test_the_kernels_are_right_in_tritons_interpreter():
    # A process of its own: the variable has to be there before Triton is imported. Its NumPy warns of inf - inf.
    run(*PYTEST, "-W", "ignore", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_right_on_a_gpu():
    run(*PYTEST, *PARALLEL)


def test_for_gpus_that_are_not_here_three_programs_fit_and_none_spills_and_rows_are_read_as_vectors():
    run("-W", "error", "-c", COMPILE)

"""The stage `loss`: time and memory of the divergence beside its floor and its peers, errors, and a sweep of sizes.

Shapes: N tokens, V vocabulary, H the student's hidden width, G the teacher's, K top tokens, R rows of a tile.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clocks import measured_memory, median_ratio, median_seconds, seconds_of
from benchmarks.gpu.cells import Cell, NotMeasuredError, Where
from benchmarks.loss import BETA, CONTENDERS, Problem, gradient_errors, obstacle, ours, unblocked_products
from gkd_trainer.divergence import token_divergence
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.models.top_tokens import top_tokens
from gkd_trainer.signals import Head, HiddenSignal

TOKENS = 8192
VOCABULARY = 151936


@dataclass(frozen=True)
class Shape:
    """Hidden widths of student and teacher, and the goal for our time over that of the unblocked products."""

    H: int
    G: int
    goal: float


SHAPES = {
    "896/1536": Shape(896, 1536, 1.75),
    "2048/4096": Shape(2048, 4096, 1.35),
    "4096/4096": Shape(4096, 4096, 1.2),
}

TIMED = ("ours", "ours-frozen", "products", "torch", "trl-gkd", "trl", "liger-kernel", "liger")
BLOCKS = (512, 1024, 2048, 4096)
KERNELS = ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16))
"""Logits of each side in a program, and its warps: four or eight for each thread, since more need more registers."""
TOP_K = 64
WORKSPACE_MB = 2560
"""For the cell of memory, whose goal is this and a tenth of it beside the gradients in float32."""

_SECONDS = {"ours": 8.0, "products": 4.0, "trl": 12.0, "liger-kernel": 10.0, "liger": 40.0}
"""About how long contenders take, compilation included; the others take 6."""


def cells(where: Where) -> list[Cell]:
    """Return the cells of the stage: for each shape the goal's figures, then peers, errors, blocks; then the kernel."""
    shapes = where.pick(list(SHAPES), list(SHAPES)[:1])
    return [
        *(
            Cell("time", time_contender, _SECONDS.get(name, 6.0), {"shape": shape, "contender": name})
            for name in TIMED
            for shape in shapes
        ),
        *(
            Cell("memory", workspace_memory, 8, {"shape": shape, "student": student})
            for shape in shapes
            for student in ("bfloat16", "float32")
        ),
        *(Cell("top-k", time_top_k, 8, {"shape": shape}) for shape in shapes),
        *(
            Cell("error", gradient_error, 6, {"shape": shape, "contender": name})
            for shape in shapes
            for name in where.pick(("ours", "torch"), ("ours",))
        ),
        *(
            Cell("block", time_block, 3, {"shape": shape, "block": block})
            for shape in shapes
            for block in where.pick(BLOCKS, BLOCKS[:1])
        ),
        *(
            Cell("kernel", time_kernel, 4, {"divergence": divergence, "tile": tile, "warps": warps})
            for divergence in where.pick(("jsd", "forward_kl"), ("jsd",))
            for tile, warps in where.pick(KERNELS, ((64, 4),))
        ),
    ]


def time_contender(where: Where, shape: str, contender: str) -> dict[str, Any]:
    """Time a contender in turns with the floor; return both, the median ratio of the turns, and the bytes it takes.

    These are added at the peak to weights and inputs, and include gradients.
    """
    chosen = CONTENDERS[contender]
    if (why := obstacle(chosen, where.device)) is not None:
        raise NotMeasuredError(why)
    problem, device = problem_of(where, shape, is_frozen=chosen.is_frozen), where.torch_device
    run = functools.partial(chosen.run, problem)
    try:
        run()  # compiles
        problem.clear()
        with measured_memory(device) as memory:
            run()
        return {
            **beside_the_floor(where, run, problem, problem),
            "added_bytes": memory.added,
            "tokens": len(problem.hidden_NH),
            "vocabulary": len(problem.weight_VH),
        }
    finally:
        problem.clear()


def beside_the_floor(where: Where, run: Callable[[], None], problem: Problem, whole: Problem) -> dict[str, float]:
    """Return the seconds of a run on `problem` and of the products of `whole`, in turns, and their ratio."""
    runs = run, functools.partial(unblocked_products, whole)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(where.pick(8, 2)):
        for each, of_run in zip(runs, seconds, strict=True):
            problem.clear()
            elapsed = seconds_of(each, where.torch_device)
            if turn > 0:
                of_run.append(elapsed)
    return {
        "seconds": statistics.median(seconds[0]),
        "floor_seconds": statistics.median(seconds[1]),
        "ratio": median_ratio(*seconds),
    }


def workspace_memory(where: Where, shape: str, student: str) -> dict[str, Any]:
    """Return the bytes that the loss takes beside weights, inputs and gradients in float32, with a given workspace.

    And its seconds, beside those of the unblocked products. The teacher is in bfloat16; so are the products of a
    `student` in float32, as under mixed precision.
    """
    whole = problem_of(where, shape, is_frozen=False)
    problem = whole.with_student(getattr(torch, student))
    workspace_mb = where.pick(WORKSPACE_MB, 1)
    run = functools.partial(ours, problem, workspace_mb=workspace_mb, product_dtype=torch.bfloat16)
    run()
    problem.clear()
    with measured_memory(where.torch_device) as memory:
        run()
    return {
        "workspace_bytes": workspace_mb * 2**20,
        "bytes": memory.added - problem.gradient_bytes,
        **beside_the_floor(where, run, problem, whole),
    }


def time_top_k(where: Where, shape: str) -> dict[str, Any]:
    """Return the seconds of a teacher's top tokens from its hidden states, and of the divergence on them."""
    problem, device = problem_of(where, shape, is_frozen=False), where.torch_device
    teacher = HiddenSignal(problem.teacher_hidden_NG, Head(problem.teacher_weight_VG))
    student = HiddenSignal(problem.hidden_NH, Head(problem.weight_VH))
    find = functools.partial(top_tokens, teacher, where.pick(TOP_K, 5))
    found = find()

    def compare() -> None:
        token_divergence(student, found, beta=BETA).values_N.sum().backward()
        problem.clear()

    turns = where.pick(5, 1)
    return {"teacher_seconds": median_seconds(find, device, turns), "seconds": median_seconds(compare, device, turns)}


def gradient_error(where: Where, shape: str, contender: str) -> dict[str, Any]:
    """Return the relative errors of the gradients of bfloat16 inputs from float64, by the gap between the logits."""
    V, H = where.pick((VOCABULARY, SHAPES[shape].H), (301, 16))
    errors = gradient_errors(where.device, V, H, CONTENDERS[contender].run)
    return {"errors": {str(gap): {"hidden": hidden, "head": head} for gap, (hidden, head) in errors.items()}}


def time_block(where: Where, shape: str, block: int) -> dict[str, Any]:
    """Return the seconds of the loss with tiles of a given number of tokens."""
    problem = problem_of(where, shape, is_frozen=False)

    def run() -> None:
        ours(problem, token_block=block)
        problem.clear()

    return {"seconds": median_seconds(run, where.torch_device, turns=where.pick(5, 1))}


def time_kernel(where: Where, divergence: str, tile: int, warps: int) -> dict[str, Any]:
    """Return the seconds of only the kernel, with a gradient in bf16, and bytes per second if it read each row once."""
    from gkd_trainer.divergence import triton

    R, V = where.pick((2048, VOCABULARY), (3, 300))
    device, turns = where.torch_device, where.pick(8, 1)
    objective = Objective(beta=0.0 if divergence == "forward_kl" else BETA)
    student_RV, teacher_RV = (torch.randn(R, V, device=device) for _ in range(2))
    weight_R = torch.ones(R, device=device)
    # The kernel leaves the gradient in place of the logits, and the next turn must not compare that.
    fresh = [student_RV.clone() for _ in range(turns + 1)]

    def run() -> None:
        triton.compare_rows(
            fresh.pop(),
            teacher_RV,
            None,
            weight_R,
            None,
            objective.numbers(None),
            kind=objective.kind,
            is_tempered=False,
            is_capped=False,
            half=torch.bfloat16,
            chunk=tile,
        )

    with launched_with(triton, warps):
        seconds = median_seconds(run, device, turns)
    return {"seconds": seconds, "bytes_per_second": (2 * 4 + 2) * R * V / seconds}


@contextmanager
def launched_with(kernels: Any, warps: int) -> Iterator[None]:
    """Launch the kernels with a number of warps instead of their own."""
    before = dict(kernels.LAUNCH)
    kernels.LAUNCH["num_warps"] = warps
    try:
        yield
    finally:
        kernels.LAUNCH.update(before)


def problem_of(where: Where, shape: str, *, is_frozen: bool) -> Problem:
    """Return the inputs of a shape; the last ones are kept."""
    return _problem(where, shape, is_frozen)


@functools.lru_cache(maxsize=1)
def _problem(where: Where, shape: str, is_frozen: bool) -> Problem:
    N, V = where.pick((TOKENS, VOCABULARY), (33, 301))
    H, G = where.pick((SHAPES[shape].H, SHAPES[shape].G), (16, 24))
    return Problem.random(N, V, H, G, where.device, torch.bfloat16, is_frozen=is_frozen)

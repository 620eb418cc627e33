"""The cost of the divergence: time relative to its matrix products alone, and peak memory, compared with its peers.

    taskset -c 1 python -m benchmarks.loss            # CPU, float32, one thread on one core; about 20 minutes
    python -m benchmarks.loss --threads 2             # two threads on two cores
    python -m benchmarks.loss --cuda                  # the same on a GPU, in bfloat16
    python -m benchmarks.loss --contenders ours ours-frozen --shapes 49152,576,576
    python -m benchmarks.loss --errors                # only the error of the gradient; 15 seconds

Forward and backward of N tokens at beta 0.5. All contenders take turns in one process; a ratio is the median of the
ratios in each turn. Memory is measured in a separate process for each: the peak above weights, inputs and gradients.
TRL and Liger are left out if they are not installed. On the CPU everything is in float32, except the contenders that
name bfloat16; their time, too, is divided by that of the float32 products.

Shapes: N tokens, V vocabulary, H the student's hidden width, G the teacher's, R the tokens of a tile.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.clocks import measured_memory, median_ratio, seconds_of
from gkd_trainer.divergence import reference_jsd, token_divergence
from gkd_trainer.divergence.workspace import planned_tile
from gkd_trainer.signals import Head, HiddenSignal

BETA = 0.5
SHAPES = ("49152,576,576", "151936,896,1536")
SIGMAS = (1.0, 0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Problem:
    """Hidden states and heads of both sides; the student's get gradients."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_hidden_NG: Tensor
    teacher_weight_VG: Tensor

    @classmethod
    def random(cls, N: int, V: int, H: int, G: int, device: str, dtype: torch.dtype, *, is_frozen: bool) -> Problem:
        torch.manual_seed(0)

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, device=device) * std).to(dtype)

        problem = cls(
            normal(N, H, std=1.0),
            normal(V, H, std=2 / math.sqrt(H)),
            normal(N, G, std=1.0),
            normal(V, G, std=2 / math.sqrt(G)),
        )
        problem.hidden_NH.requires_grad_()
        problem.weight_VH.requires_grad_(not is_frozen)
        return problem

    def with_student(self, dtype: torch.dtype) -> Problem:
        """Return it with the student's hidden states and head in another dtype."""
        hidden_NH, weight_VH = (
            tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for tensor in (self.hidden_NH, self.weight_VH)
        )
        return Problem(hidden_NH, weight_VH, self.teacher_hidden_NG, self.teacher_weight_VG)

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients in float32, in which they are accumulated."""
        return 4 * sum(tensor.numel() for tensor in (self.hidden_NH, self.weight_VH) if tensor.requires_grad)

    def clear(self) -> None:
        self.hidden_NH.grad = self.weight_VH.grad = None


def ours(problem: Problem, **options: Any) -> None:
    student = HiddenSignal(problem.hidden_NH, Head(problem.weight_VH))
    teacher = HiddenSignal(problem.teacher_hidden_NG, Head(problem.teacher_weight_VG))
    token_divergence(student, teacher, beta=BETA, **options).values_N.sum().backward()


def ours_bf16_products(problem: Problem) -> None:
    ours(problem, product_dtype=torch.bfloat16)


@torch.no_grad()
def products_alone(problem: Problem) -> None:
    """Make the products that `ours` makes, in its tiles: what no divergence from hidden states goes below."""
    N, V = len(problem.hidden_NH), len(problem.weight_VH)
    largest = planned_tile(N, V, problem.hidden_NH.device)
    options = {"device": problem.hidden_NH.device, "dtype": problem.hidden_NH.dtype}
    student_RV, teacher_RV = torch.empty(largest, V, **options), torch.empty(largest, V, **options)
    hidden_gradient_NH = torch.empty_like(problem.hidden_NH)
    weight_gradient_VH = torch.zeros_like(problem.weight_VH) if problem.weight_VH.requires_grad else None
    for start in range(0, N, largest):
        hidden_RH = problem.hidden_NH[start : start + largest]
        tile = slice(start, start + len(hidden_RH))
        logits_RV = student_RV[: len(hidden_RH)]
        torch.mm(hidden_RH, problem.weight_VH.T, out=logits_RV)
        torch.mm(problem.teacher_hidden_NG[tile], problem.teacher_weight_VG.T, out=teacher_RV[: len(hidden_RH)])
        torch.mm(logits_RV, problem.weight_VH, out=hidden_gradient_NH[tile])
        if weight_gradient_VH is not None:
            weight_gradient_VH.addmm_(logits_RV.T, hidden_RH)


@torch.no_grad()
def unblocked_products(problem: Problem) -> None:
    """Make the same products whole, as fast as the library can: nothing with these products is faster."""
    logits_NV = problem.hidden_NH @ problem.weight_VH.T
    problem.teacher_hidden_NG @ problem.teacher_weight_VG.T
    logits_NV @ problem.weight_VH
    if problem.weight_VH.requires_grad:
        logits_NV.T @ problem.hidden_NH


def plain_torch(problem: Problem) -> None:
    plain_divergence(*_logits(problem)).backward()


def _logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return whole logits in the dtype of their inputs, as models compute them."""
    linear = torch.nn.functional.linear
    with torch.no_grad():
        teacher_logits_NV = linear(problem.teacher_hidden_NG, problem.teacher_weight_VG)
    return linear(problem.hidden_NH, problem.weight_VH), teacher_logits_NV


def plain_divergence(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """Return the sum of the divergences of all tokens, from whole logits by torch's own functions."""
    log_q_NV = torch.log_softmax(student_logits_NV.float(), dim=1)
    log_p_NV = torch.log_softmax(teacher_logits_NV.float(), dim=1)
    log_m_NV = torch.logaddexp(log_p_NV + math.log(BETA), log_q_NV + math.log(1 - BETA))
    kl = torch.nn.functional.kl_div
    kl_p = kl(log_m_NV, log_p_NV, reduction="sum", log_target=True)
    kl_q = kl(log_m_NV, log_q_NV, reduction="sum", log_target=True)
    return BETA * kl_p + (1 - BETA) * kl_q


def trl_gkd(problem: Problem) -> None:
    from trl.experimental.gkd import GKDTrainer

    GKDTrainer.generalized_jsd_loss(*_logits(problem), beta=BETA, reduction="sum").backward()


def trl(problem: Problem) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values_N, _ = ChunkedDivergenceFunction.apply(
        problem.hidden_NH, problem.weight_VH, None, problem.teacher_hidden_NG, problem.teacher_weight_VG, None, BETA
    )
    values_N.sum().backward()


def liger(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=True)
    labels_N = torch.zeros(len(problem.hidden_NH), dtype=torch.long, device=problem.hidden_NH.device)
    loss(
        problem.hidden_NH, problem.weight_VH, problem.teacher_hidden_NG, problem.teacher_weight_VG, labels_N
    ).backward()


def liger_kernel(problem: Problem) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA)
    loss(problem.hidden_NH, problem.weight_VH, problem.teacher_hidden_NG, problem.teacher_weight_VG, None).backward()


@dataclass(frozen=True)
class Contender:
    """A way to compute the divergence; `floor` names the contender that its time is divided by, None for a floor.

    `dtype` is that of hidden states and heads; None for the run's. One that `is_on_gpu` runs nowhere else.
    """

    run: Callable[[Problem], None]
    title: str
    is_frozen: bool = False
    dtype: torch.dtype | None = None
    floor: str | None = "products"
    is_slow: bool = False
    needs: str | None = None
    is_on_gpu: bool = False


CONTENDERS = {
    "products": Contender(products_alone, "products alone", floor=None),
    "unblocked": Contender(unblocked_products, "products alone, unblocked", floor=None, is_slow=True),
    "products-frozen": Contender(products_alone, "products alone, frozen head", is_frozen=True, floor=None),
    "ours": Contender(ours, "ours"),
    "ours-frozen": Contender(ours, "ours, frozen head", is_frozen=True, floor="products-frozen"),
    "ours-products-bf16": Contender(ours_bf16_products, "ours, gradient products in bf16"),
    "ours-bf16": Contender(ours_bf16_products, "the same, all inputs in bf16", dtype=torch.bfloat16),
    "torch": Contender(plain_torch, "plain torch", is_slow=True),
    "trl-gkd": Contender(trl_gkd, "plain torch, TRL's GKDTrainer", is_slow=True, needs="trl"),
    "trl": Contender(trl, "TRL chunked divergence", is_slow=True, needs="trl"),
    "liger": Contender(liger, "Liger chunked JSD, compiled", needs="liger_kernel"),
    "liger-kernel": Contender(liger_kernel, "Liger's Triton kernel", needs="liger_kernel", is_on_gpu=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU, in bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="threads, each on its own core")
    parser.add_argument("--cores", type=int, nargs="+", help="the cores to run on; by default, the first ones allowed")
    parser.add_argument("--tokens", type=int, help="N; by default, 1024, and 8192 on a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="turns per contender; slow ones take two")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="each is V,H,G")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--errors", action="store_true", help="only print the error of the gradient by precision")
    parser.add_argument("--memory-of", nargs=3, metavar=("CONTENDER", "SHAPE", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if args.cuda else "cpu"
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda needs a GPU that this torch can use; got none: omit it to measure on the CPU")
    cores = args.cores or sorted(os.sched_getaffinity(0))[: args.threads]
    if not args.cuda:
        if len(cores) < args.threads:
            parser.error(f"--threads {args.threads} needs as many cores; got {cores}: threads that share a core wait")
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.cuda else torch.float32
    if args.memory_of:
        name, shape, N = args.memory_of
        print(json.dumps(measure_memory(CONTENDERS[name], sizes(shape), int(N), device, dtype)))
        return

    N = args.tokens or (8192 if args.cuda else 1024)
    console = Console(width=120)
    if args.errors:
        console.print(errors_table(device))
        return
    where = torch.cuda.get_device_name() if args.cuda else f"cores {cores}, {torch.get_num_threads()} thread(s)"
    console.print(f"torch {torch.__version__}, {where}, {dtype}, beta {BETA}, load average {os.getloadavg()[0]:.1f}")
    names = [name for name in args.contenders if obstacle(CONTENDERS[name], device) is None]
    if args.cuda:
        names = [name for name in names if CONTENDERS[name].dtype is None and "bf16" not in name]
    for shape in args.shapes:
        console.print(compare(names, shape, N, device, dtype, args))
    if not args.cuda:
        seconds = first_call_seconds(args.shapes[0], args.threads)
        console.print(f"first call with an empty compilation cache: {seconds:.1f} s")
    console.print(errors_table(device))


def compare(names: list[str], shape: str, N: int, device: str, dtype: torch.dtype, args: argparse.Namespace) -> Table:
    """Return the table for one shape: seconds in turns in this process, memory in a process per contender."""
    kinds = {(CONTENDERS[name].is_frozen, CONTENDERS[name].dtype or dtype) for name in names}
    problems = {
        (is_frozen, of): Problem.random(N, *sizes(shape), device, of, is_frozen=is_frozen) for is_frozen, of in kinds
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds + 1):
        for name in names:
            contender = CONTENDERS[name]
            if contender.is_slow and turn > 2:
                continue
            problem = problems[contender.is_frozen, contender.dtype or dtype]
            elapsed = seconds_of(functools.partial(contender.run, problem), torch.device(device))
            problem.clear()
            if turn > 0:  # the first turn compiles
                seconds[name].append(elapsed)
    del problems, problem
    gc.collect()

    V, H, G = sizes(shape)
    table = Table(title=f"V = {V}, H = {H}, G = {G}, N = {N}")
    for column in ("", "seconds", "over its products", "over ours", "peak MB", "peak MB at N = 8192"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        contender = CONTENDERS[name]
        floor = contender.floor if contender.floor in seconds else None
        large = ""
        if name in ("ours", "ours-frozen"):
            large = f"{_memory_elsewhere(name, shape, 8192, args):.0f}"
        table.add_row(
            contender.title,
            f"{statistics.median(seconds[name]):.3f}",
            "" if floor is None else f"{median_ratio(seconds[name], seconds[floor]):.2f}",
            f"{median_ratio(seconds[name], seconds['ours']):.2f}" if "ours" in seconds else "",
            f"{_memory_elsewhere(name, shape, N, args):.0f}",
            large,
        )
    return table


def measure_memory(contender: Contender, shape: tuple[int, int, int], N: int, device: str, dtype: torch.dtype) -> float:
    """Return the peak of one run in this process, in MiB above weights, inputs and gradients."""
    problem = Problem.random(N, *shape, device, contender.dtype or dtype, is_frozen=contender.is_frozen)
    few = Problem(
        problem.hidden_NH[:8].detach().requires_grad_(),
        problem.weight_VH,
        problem.teacher_hidden_NG[:8],
        problem.teacher_weight_VG,
    )
    contender.run(few)  # compiles, and loads whatever is loaded only once
    few.clear()
    problem.clear()
    with measured_memory(torch.device(device)) as memory:
        contender.run(problem)
    return (memory.added - problem.gradient_bytes) / 2**20


def first_call_seconds(shape: str, threads: int) -> float:
    """Return how long the first call takes in a new process with an empty compilation cache."""
    code = (
        f"import time, torch; torch.set_num_threads({threads}); from benchmarks.loss import *\n"
        f"problem = Problem.random(64, *sizes({shape!r}), 'cpu', torch.float32, is_frozen=False)\n"
        "start = time.perf_counter(); ours(problem); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        return float(_output([sys.executable, "-c", code], TORCHINDUCTOR_CACHE_DIR=cache))


def gradient_errors(
    device: str, V: int = 49152, H: int = 576, run: Callable[[Problem], None] = ours
) -> dict[float, tuple[float, ...]]:
    """Return, for each logit gap, the relative error in norm of the gradients of bfloat16 inputs, from float64."""
    errors = {}
    for sigma in SIGMAS:
        problem = Problem.random(64, V, H, H, device, torch.bfloat16, is_frozen=False)
        noise_NH = sigma / 2 * torch.randn_like(problem.hidden_NH)
        # The head turns hidden states of size 1 into logits of size 2.
        problem = Problem(
            problem.hidden_NH,
            problem.weight_VH,
            (problem.hidden_NH + noise_NH).detach(),
            problem.weight_VH.detach(),
        )
        run(problem)
        actual = (problem.hidden_NH.grad, problem.weight_VH.grad)
        leaves = [tensor.detach().double().requires_grad_() for tensor in (problem.hidden_NH, problem.weight_VH)]
        teacher_logits_NV = problem.teacher_hidden_NG.double() @ problem.teacher_weight_VG.double().T
        values_N = reference_jsd(leaves[0] @ leaves[1].T, teacher_logits_NV, beta=BETA)
        expected = torch.autograd.grad(values_N.sum(), leaves)
        errors[sigma] = tuple(
            float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True) if a is not None
        )
    return errors


def rounding_errors(V: int = 4000, H: int = 576) -> dict[float, tuple[float, float]]:
    """Return, for each logit gap, the relative error in norm of the head's gradient if a float32 student is rounded.

    To bfloat16, emulated in float64: only its hidden states and head, as for products of halves, then its logits too.
    """
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(64, H).double(), (torch.randn(V, H) * 3.2 / math.sqrt(H)).double()
    rounded_NH, rounded_VH = hidden_NH.bfloat16().double(), weight_VH.bfloat16().double()
    exact_NV, of_inputs_NV = hidden_NH @ weight_VH.T, rounded_NH @ rounded_VH.T
    errors = {}
    for sigma in SIGMAS:
        teacher_NV = exact_NV + sigma * torch.randn_like(exact_NV)
        exact_VH, of_inputs_VH, of_logits_VH = (
            logits_gradient(logits_NV, teacher_NV).T @ states_NH
            for logits_NV, states_NH in (
                (exact_NV, hidden_NH),
                (of_inputs_NV, rounded_NH),
                (of_inputs_NV.bfloat16().double(), rounded_NH),
            )
        )
        norm = exact_VH.norm()
        errors[sigma] = (float((of_inputs_VH - exact_VH).norm() / norm), float((of_logits_VH - exact_VH).norm() / norm))
    return errors


def logits_gradient(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    leaf_NV = logits_NV.detach().requires_grad_()
    return torch.autograd.grad(reference_jsd(leaf_NV, teacher_NV, beta=BETA).sum(), leaf_NV)[0]


def errors_table(device: str) -> Table:
    """Return the error of the head's gradient by what is rounded to bfloat16, for each logit gap."""
    table = Table(title=f"relative error of the head's gradient, beta {BETA}, inputs and logits of bfloat16")
    for column in ("logit gap", "bfloat16 inputs", "float32 inputs, rounded", "the same, and their logits"):
        table.add_column(column, justify="right")
    measured, emulated = gradient_errors(device), rounding_errors()
    for sigma in SIGMAS:
        cells = (measured[sigma][1], *emulated[sigma])
        table.add_row(str(sigma), *(f"{error:.2%}" for error in cells))
    return table


def sizes(shape: str) -> tuple[int, int, int]:
    V, H, G = map(int, shape.split(","))
    return V, H, G


def _memory_elsewhere(name: str, shape: str, N: int, args: argparse.Namespace) -> float:
    # The process inherits the cores.
    arguments = ["--memory-of", name, shape, str(N), "--threads", str(args.threads), *(["--cuda"] if args.cuda else [])]
    return float(json.loads(_output([sys.executable, "-m", "benchmarks.loss", *arguments])))


def _output(command: list[str], **environment: str) -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with contextlib.suppress(KeyError):
        environment["PYTHONPATH"] = f"{root}:{os.environ['PYTHONPATH']}"
    environment.setdefault("PYTHONPATH", root)
    done = subprocess.run(
        command, env=os.environ | environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip().splitlines()[-1]


def obstacle(contender: Contender, device: str) -> str | None:
    """Return why a contender can't run here; None if it can."""
    if contender.needs is not None and importlib.util.find_spec(contender.needs) is None:
        return f"not installed: {contender.needs}"
    return "it runs only on a GPU" if contender.is_on_gpu and device == "cpu" else None


if __name__ == "__main__":
    main()

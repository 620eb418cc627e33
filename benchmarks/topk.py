"""The work of top-k: launches and bytes on a GPU, counted without one, and the time of a teacher's top tokens on a CPU.

    python -m benchmarks.topk

Operations of the student's side are counted as torch dispatches them, for tensors on the CPU; a kernel of Triton reads
and writes what its passes say. Each reads its inputs and writes its outputs once: no cache is modelled.
Shapes: N tokens, R of a tile, V vocabulary, H, G the hidden widths of student and teacher, K top tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gkd_trainer.divergence import rows, triton, triton_topk
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.topk import TopKComparison
from gkd_trainer.models.top_tokens import top_tokens
from gkd_trainer.signals import Head, HiddenSignal

BANDWIDTH = 3.0e12
"""Bytes per second to a GPU's memory, as assumed for an H100."""

TEMPORARY = 2**21
"""The elements of a temporary in plain torch under a workspace of 1 GiB."""

VIEWS = ("view", "slice", "detach", "alias", "expand", "select", "squeeze", "unbind", "empty", "as_strided", "split")
"""Operations that launch nothing."""


class Work(TorchDispatchMode):
    """Counts launches, and the bytes of their inputs and outputs; all of a pass over elements of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        if not any(word in operation.name() for word in VIEWS):
            self.launches += 1
            self.bytes += sum(_bytes(tensor) for tensor in tree_leaves((args, kwargs, outputs)))
        return outputs


class Counted:
    """Stands in for a kernel: counts a launch of it, and the bytes of its passes over the vocabulary."""

    def __init__(self, work: Work, per_element: int, elements: int) -> None:
        self.work, self.bytes = work, per_element * elements

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a launch that only counts."""

        def launch(*args: Any, **options: Any) -> None:
            self.work.launches += 1
            self.work.bytes += self.bytes

        return launch


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tile", type=int, default=1024, help="tokens compared at once")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--teacher-tokens", type=int, default=256, help="tokens of the timed teacher")
    parser.add_argument("--teacher-width", type=int, default=896, help="hidden width of the timed teacher")
    options = parser.parse_args()
    N, V, K = options.tokens, options.vocabulary, options.top_k
    print(f"student's statistics and gradient, N = {N}, V = {V}, K = {K}, a gradient for products of halves")
    print("launches | GB | ms at 3.0 TB/s")
    for engine in ("eager", "kernels"):
        tiles = -(-N // options.tile)
        launches, moved = (tiles * count for count in student_work(engine, N // tiles, V, K))
        print(f"{engine} | {launches:,} | {moved / 1e9:.1f} | {1e3 * moved / BANDWIDTH:.1f}")
    seconds = [teacher_seconds(of, options.teacher_tokens, V, options.teacher_width) for of in (converted, top_tokens)]
    print(f"teacher's top tokens in bfloat16 on this CPU: {seconds[0]:.2f} s before, {seconds[1]:.2f} s now")
    return 0


def student_work(engine: str, R: int, V: int, K: int) -> tuple[int, int]:
    """Return the launches and bytes for a tile, with the rounding of its gradient."""
    logits_RV = torch.randn(R, V)
    top_RK = torch.randn(R, min(V, 16 * K)).log_softmax(dim=1).topk(K, dim=1)
    weight_R = torch.ones(R)
    work = Work()
    is_eager = engine == "eager"
    places = {
        (rows, "_engine"): "eager" if is_eager else "triton",
        (rows, "_CPU_TILE_ELEMENTS"): rows._TILE_ELEMENTS,
        (triton_topk, "_categories_kernel"): Counted(work, 4, R * V),
        (triton_topk, "_gradient_kernel"): Counted(work, 4 + 2, R * V),
        (triton, "_compare_kernel"): Counted(work, 4 * 2 * 3, R * (K + 1)),
    }
    originals = {place: getattr(*place) for place in places}
    for place, value in places.items():
        setattr(*place, value)
    try:
        with work:
            compare = TopKComparison(
                Objective(beta=0.5), temporary=TEMPORARY, half=None if is_eager else torch.bfloat16
            )
            compare(logits_RV, (top_RK.indices, top_RK.values), value_weight_R=weight_R)
            if is_eager:
                torch.empty_like(logits_RV, dtype=torch.bfloat16).copy_(logits_RV)
    finally:
        for place, value in originals.items():
            setattr(*place, value)
    return work.launches, work.bytes


def teacher_seconds(of: Callable[[HiddenSignal, int], Any], N: int, V: int, G: int) -> float:
    """Return the seconds for the top 64 of a bfloat16 teacher's tokens, the better of two calls."""
    signal = HiddenSignal(torch.randn(N, G).bfloat16(), Head((torch.randn(V, G) / G**0.5).bfloat16()))
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        of(signal, 64)
        taken.append(time.perf_counter() - start)
    return min(taken)


def converted(signal: HiddenSignal, k: int) -> list[Tensor]:
    """Return top log-probs as before: the whole head in float32, and 2**24 logits at a time."""
    head = Head(signal.head.weight_VH.float())
    parts = signal.hidden_NH.split(max(1, 2**24 // signal.vocab_size))
    return [head.logits(hidden_RH).log_softmax(dim=1).topk(k, dim=1).values for hidden_RH in parts]


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


if __name__ == "__main__":
    sys.exit(main())

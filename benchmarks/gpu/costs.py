"""Estimate the time of the divergence on a GPU from the work that it does. Nothing here is measured.

    python -m benchmarks.gpu.costs

Flops and bytes follow from the shapes, instructions from the kernel, which is compiled here and needs no GPU. Each step
takes as long as the slowest of what it does: multiplying, moving bytes or issuing instructions, at the full rate of the
card. Launches are left out.

Shapes: N tokens, V vocabulary, H the student's hidden width, G the teacher's, R the tokens of a tile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf, log2
from pathlib import Path

FLOAT, HALF = 4, 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Card:
    """What a GPU does per second, as assumed.

    Attributes:
        products: floating-point operations of large products of bfloat16.
        bandwidth: bytes to or from memory.
        instructions: instructions of single threads.
        cache: bytes of the L2 cache that the rows of two passes may share.
        programs: how many rows are compared at the same time.
        latency: seconds from a request to the L2 cache to its answer.
    """

    name: str
    products: float
    bandwidth: float
    instructions: float
    cache: float
    programs: int
    latency: float


# 132 multiprocessors issue 128 per cycle at 1.7 GHz, and run two programs each. Data that both halves of the L2 cache
# need is in both, so that half of its 50 MB counts.
H100 = Card("H100", 700e12, 3.0e12, 132 * 128 * 1.7e9, 25e6, 2 * 132, 0.2e-6)
ALL_CACHED = replace(H100, cache=inf)


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary, both hidden widths, and how many times the floor the divergence should take at most."""

    N: int
    V: int
    H: int
    G: int
    goal: float


SHAPES = (
    Shape(8192, 151_936, 896, 1536, 1.75),
    Shape(8192, 151_936, 2048, 4096, 1.35),
    Shape(8192, 151_936, 4096, 4096, 1.2),
)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what a thread takes, and what it does.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that registers had no room for.
        vector_accesses: loads and stores of 16 bytes.
        instructions: per element of the vocabulary in each pass over a row.
        ptx: the code before registers are assigned.
    """

    registers: int
    spilled: int
    vector_accesses: int
    instructions: tuple[float, ...]
    ptx: str = field(default="", repr=False)


@dataclass(frozen=True)
class Estimate:
    """Seconds: of the four products at full rate, of the products as made, of comparing rows, and of the rest."""

    floor: float
    products: float
    comparison: float
    rest: float

    @property
    def total(self) -> float:
        """Seconds of everything."""
        return self.products + self.comparison + self.rest


def estimate(shape: Shape, card: Card, kernel: Kernel, R: int) -> Estimate:
    """Return the estimate for forward and backward in tiles of R tokens, all weights and hidden states in bfloat16."""
    N, V, H, G = shape.N, shape.V, shape.H, shape.G
    tiles = [min(R, N - start) for start in range(0, N, R)]
    products = 0.0
    for index, rows in enumerate(tiles):
        logits = rows * V
        # The first tile writes the weight's gradient, the others add to it.
        of_weight = FLOAT * V * H * (1 if index == 0 else 2)
        for width, moved in (
            (H, HALF * (rows + V) * H + FLOAT * logits),
            (G, HALF * (rows + V) * G + FLOAT * logits),
            (H, HALF * (logits + V * H) + 2 * FLOAT * rows * H),
            (H, HALF * (logits + rows * H) + of_weight),
        ):
            products += max(2 * logits * width / card.products, moved / card.bandwidth)
    passes = len(kernel.instructions)
    both_sides = 2 * FLOAT
    # Passes alternate in direction: each finds the part of its rows that the one before read last.
    cached = min(1.0, card.cache / (card.programs * V * both_sides))
    bytes_per_element = both_sides * (passes - (passes - 1) * cached) + HALF
    return Estimate(
        floor=2 * N * V * (3 * H + G) / card.products,
        products=products,
        comparison=N * V * max(bytes_per_element / card.bandwidth, sum(kernel.instructions) / card.instructions),
        # Zeros for the gradient of the hidden states; then both gradients are scaled into bfloat16.
        rest=(FLOAT * N * H + (FLOAT + HALF) * (N + V) * H) / card.bandwidth,
    )


def trl_products(shape: Shape, card: Card) -> float:
    """Return the seconds at full rate of the products alone that TRL 1.16's chunked JSD makes, by its source.

    Its forward projects both sides for the normalisers and again for the divergence, its backward a third time, and
    then multiplies for the gradients of hidden states and weight.
    """
    return 2 * shape.N * shape.V * (5 * shape.H + 3 * shape.G) / card.products


def liger_kernel(shape: Shape, card: Card) -> float:
    """Return the estimate for Liger 0.8.5's LigerFusedLinearJSD on an H100, by its source.

    It makes the four products for R = 64 to 256 tokens at once, and reads the weights each time. Between them, torch's
    functions and one kernel move 110 bytes per pair of logits, in float32: both logits written (8), divided by the
    temperature (16) and turned into log-probabilities (16), the student's probabilities (8), the JSD with values and
    gradient written (16), both summed (8), the gradient of the logits in three steps (28), rounded to half precision
    (6), and read by two products (4). None of it is assumed to be in the cache.
    """
    N, V, H, G = shape.N, shape.V, shape.H, shape.G
    R = min(N, 2 ** ceil(log2(ceil(N / ceil(V / H)))))
    products = 0.0
    for width, moved in ((H, HALF * V * H), (G, HALF * V * G), (H, HALF * V * H), (H, 2 * HALF * V * H)):
        products += max(2 * R * V * width / card.products, moved / card.bandwidth)
    return ceil(N / R) * products + N * V * 110 / card.bandwidth


@dataclass(frozen=True)
class Queue:
    """Pieces of rows that programs would take from a queue, to share rows that stay in the cache.

    Attributes:
        piece: logits of each side in a piece.
        pieces: that each program handles.
        waiting: seconds that a program waits for the cache, not for logits.
    """

    piece: float
    pieces: float
    waiting: float


def queue_of_pieces(shape: Shape, card: Card, passes: int) -> Queue:
    """Return what sharing rows would take: a piece's pass begins when all pieces of its row have finished the last one.

    The queue holds the passes of a row so far apart that nobody waits for long: between two of them come as many pieces
    as there are programs. The rows in use then are those of `2 * passes - 1` times as many pieces, and must fit into
    the cache. A piece takes four requests, each after the answer to the one before: for its number, for whether its row
    is ready, for the sums of the row so far, and to add its own.
    """
    rows = card.cache / (shape.V * 2 * FLOAT)
    per_row = card.programs * (2 * passes - 1) / rows
    pieces = shape.N * passes * per_row / card.programs
    return Queue(shape.V / per_row, pieces, 4 * card.latency * pieces)


def compile_kernel(
    kind: str, capability: int, *, has_labels: bool = False, gradient_type: str = "*bf16", chunk: int | None = None
) -> Kernel:
    """Compile the kernel for a GPU that need not be here, with aligned rows.

    `kind` is that of `Objective`, `capability` 80 for an A100 or 90 for an H100, `gradient_type` in Triton's words.
    With labels, there are a temperature, a soft-cap and a weighted cross entropy too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gkd_trainer.divergence import triton as kernels

    kernel = kernels._compare_kernel
    types = {"labels_ptr": "*i64", "gradient_ptr": gradient_type, "R": "i32", "V": "i32"}
    signature, constants, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        is_pointer, is_stride, is_constant = (
            name.endswith("_ptr"),
            name.endswith("_stride"),
            name.isupper() and len(name) > 1,
        )
        signature[name] = types.get(name) or (
            "*fp32" if is_pointer else "i32" if is_stride else "constexpr" if is_constant else "fp32"
        )
        if is_constant:
            constants[name] = has_labels
        if is_pointer or is_stride:
            aligned[(index,)] = [["tt.divisibility", 16]]
    chunk = kernels.CHUNK if chunk is None else chunk
    constants |= {"KIND": kind, "CHUNK": chunk, "HAS_GRADIENT": True}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.LAUNCH)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = _tool("cuobjdump", "-res-usage", cubin.name), _tool("nvdisasm", "-c", cubin.name)
    of_thread = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    elements = chunk / (32 * kernels.LAUNCH["num_warps"])
    return Kernel(
        registers=int(of_thread["REG"]),
        spilled=int(of_thread["STACK"]) + int(of_thread["LOCAL"]),
        vector_accesses=len(re.findall(r"(?:LDG|STG)\.E\.\S*128", code)),
        instructions=tuple(count / elements for count in loop_lengths(code)),
        ptx=compiled.asm["ptx"],
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def loop_lengths(code: str) -> Iterator[int]:
    """Yield the number of instructions in each loop that reads memory, without what only its last turn executes.

    That turn reads and writes with a mask, one number at a time: blocks with such accesses are left out.
    """
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", code, re.MULTILINE)
    labels = {label: index for index, (label, _) in enumerate(lines) if label}
    for end, (_, instruction) in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if target is None or not labels[target[1]] < end:
            continue
        blocks: list[list[str]] = [[]]
        for label, inside in lines[labels[target[1]] : end + 1]:
            if label:
                blocks.append([])
                continue
            blocks[-1].append(inside)
            if re.search(r"\bBRA\b", inside):
                blocks.append([])
        if any("LDG" in inside for block in blocks for inside in block):
            yield sum(len(block) for block in blocks if not any(map(_is_of_one_number, block)))


def _is_of_one_number(instruction: str) -> bool:
    return re.search(r"\b(LDG|STG)\b", instruction) is not None and "128" not in instruction


def table(card: Card, kernel: Kernel, R: int) -> str:
    """Return the estimates in milliseconds as a Markdown table.

    The last columns are times over the floor too: what a kernel would reach that reads rows from memory once, and later
    from the cache; TRL's products alone; and Liger's kernel.
    """
    rows = [
        "| H student / teacher | floor | products | comparison | rest | total "
        "| over the floor | goal | read once | TRL | Liger |",
        "|---" * 11 + "|",
    ]
    for shape in SHAPES:
        seconds = estimate(shape, card, kernel, R)
        parts = (seconds.floor, seconds.products, seconds.comparison, seconds.rest, seconds.total)
        numbers = " | ".join(f"{1e3 * part:.1f}" for part in parts)
        once = estimate(shape, ALL_CACHED, kernel, R)
        ratios = f"{seconds.total / seconds.floor:.2f} | {shape.goal} | {once.total / once.floor:.2f}"
        trl, liger = (of(shape, card) / seconds.floor for of in (trl_products, liger_kernel))
        rows.append(f"| {shape.H} / {shape.G} | {numbers} | {ratios} | > {trl:.2f} | {liger:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table of the JSD on an H100, and the kernels of all kinds."""
    from gkd_trainer.divergence.triton import KINDS

    kernel = compile_kernel("jsd", 90)
    print(f"{H100.name}, estimated: N = {SHAPES[0].N}, V = {SHAPES[0].V}, milliseconds, tiles of 2048 tokens\n")
    print(table(H100, kernel, 2048))
    queue = queue_of_pieces(SHAPES[0], H100, len(kernel.instructions))
    of_request = 4 * queue.pieces
    saved = estimate(SHAPES[0], H100, kernel, 2048).total - estimate(SHAPES[0], ALL_CACHED, kernel, 2048).total
    print(
        f"\nTo read once by a queue: pieces of {queue.piece:,.0f} logits, {queue.pieces:,.0f} per program, waiting "
        f"{1e3 * queue.waiting:.1f} ms of a program to save {1e3 * saved:.1f} ms, which are equal if a request takes "
        f"{1e6 * saved / of_request:.2f} µs"
    )
    print(
        "\n| kind, sm_90 | registers | spilled | 16-byte accesses | instructions per element in each pass |\n"
        + "|---" * 5
        + "|"
    )
    for kind in sorted(KINDS):
        kernel = compile_kernel(kind, 90)
        passes = ", ".join(f"{count:.0f}" for count in kernel.instructions)
        print(f"| {kind} | {kernel.registers} | {kernel.spilled} | {kernel.vector_accesses} | {passes} |")


if __name__ == "__main__":
    main()

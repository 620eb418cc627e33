"""A teacher in this process, behind a server of top tokens, and behind one of hidden states: time, bytes, errors.

    python -m benchmarks.server_teachers --pair .cache/smollm2

prints one table per dtype of the teacher. "s" is the time of `score` for 4 sequences of 200 tokens, all of which are
trained on; all teachers take turns in one run, on one pinned core, which the servers share. "CPU s" is processor time,
the servers' included, which excludes waiting: where it is well below the seconds, the core was shared, and it is more
reliable. "bytes per token" is what the servers answered, per token of the sequences. The other columns are the relative
errors of the gradient with respect to the student's logits, against a teacher in this process in float32: for a student
close to its teacher (the teacher's logits with Gaussian noise of 0.2 added) and for the pruned student of the pair.

Shapes: N tokens trained on, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.pair import announce, in_turns, load, parser, pin, table, tokenizer_of
from benchmarks.rollouts import token_rows, vllm_server

DTYPES = ("float32", "bfloat16")
SEQUENCES, LENGTH, NOISE = 4, 200, 0.2
BETAS = (0.0, 0.5, 1.0)
HIDDEN_STATES = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task": "token_embed"}')


@dataclass
class Contender:
    """A prepared teacher, its last signal and the bytes that servers answered for it."""

    teacher: Any
    signal: Any = None
    answered: int = 0


def main() -> None:
    """Measure the dtypes that were asked for."""
    options = parser(__doc__, DTYPES).parse_args()
    pin(options)
    announce(options)
    batch = batch_of(options)
    exact = local_teacher(options, "float32").score(batch)
    students = students_of(options, batch, exact)
    expected = {key: gradient(logits_NV, exact, beta) for key, (logits_NV, beta) in cases(students)}
    for dtype in options.parts:
        with ExitStack() as stack:
            contenders = contenders_of(options, dtype, stack)
            report(options, dtype, contenders, batch, students, expected)


def contenders_of(options: argparse.Namespace, dtype: str, stack: ExitStack) -> dict[str, Contender]:
    """Start a server of each kind, and return the teachers to compare."""
    import torch

    from gkd_trainer.teachers import HiddenStateServerTeacher, VLLMServerTeacher

    folder = options.pair / "teacher"
    top_url = stack.enter_context(vllm_server(options, folder, dtype, "--max-logprobs", "64"))
    hidden_url = stack.enter_context(vllm_server(options, folder, dtype, *HIDDEN_STATES))
    sent = {"float32": ("auto", "float16", "bfloat16", "fp8_e4m3"), "bfloat16": ("auto", "fp8_e4m3")}[dtype]
    teachers = [
        local_teacher(options, dtype),
        *(VLLMServerTeacher(top_url, top_k=k) for k in (20, 64)),
        *(HiddenStateServerTeacher(hidden_url, folder, dtype=each) for each in sent),
    ]
    for teacher in teachers:
        teacher.prepare(torch.device("cpu"), tokenizer_of(options))
    return {name_of(teacher): Contender(teacher) for teacher in teachers}


def name_of(teacher: Any) -> str:
    """Return what a prepared teacher is called in the table."""
    if teacher.is_local:
        return "in this process"
    if teacher.top_k is not None:
        return f"server, top {teacher.top_k}"
    return f"server, hidden states in {teacher.dtype}"


def report(
    options: argparse.Namespace,
    dtype: str,
    contenders: Mapping[str, Contender],
    batch: Any,
    students: Mapping[str, Any],
    expected: Mapping[tuple[str, float], Any],
) -> None:
    """Print the table of a dtype."""

    def score(contender: Contender) -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), cpu_seconds()
        with counted_answers() as count:
            contender.signal = contender.teacher.score(batch)
        contender.answered = count()
        return time.perf_counter() - began, cpu_seconds() - cpu_began

    turns = in_turns({name: partial(score, each) for name, each in contenders.items()}, options.repeats)
    rows = []
    for name, contender in contenders.items():
        errors = []
        for key, (logits_NV, beta) in cases(students):
            difference_NV = gradient(logits_NV, contender.signal, beta) - expected[key]
            errors.append(f"{100 * float(difference_NV.norm() / expected[key].norm()):.2g} %")
        size = f"{contender.answered / (SEQUENCES * LENGTH):.0f}"
        times = [f"{statistics.median(figures):.2f}" for figures in zip(*turns[name], strict=True)]
        rows.append([name, *times, size, *errors])
    title = f"A teacher in {dtype}: {SEQUENCES} sequences of {LENGTH} tokens"
    columns = [f"{student}, β = {beta:g}" for student in students for beta in BETAS]
    table(title, ["teacher", "s", "CPU s", "bytes per token", *columns], rows)


def cpu_seconds() -> float:
    """Return the processor time of this process and of the servers that it started."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def cases(students: Mapping[str, Any]) -> Iterator[tuple[tuple[str, float], tuple[Any, float]]]:
    """Yield each student's logits with each β, under a key."""
    for name, logits_NV in students.items():
        for beta in BETAS:
            yield (name, beta), (logits_NV, beta)


def gradient(logits_NV: Any, signal: Any, beta: float) -> Any:
    """Return the gradient of the summed divergence with respect to the student's logits."""
    from gkd_trainer.divergence import token_divergence
    from gkd_trainer.signals import LogitsSignal

    logits_NV = logits_NV.detach().requires_grad_()
    token_divergence(LogitsSignal(logits_NV), signal, beta=beta).values_N.sum().backward()
    return logits_NV.grad


def students_of(options: argparse.Namespace, batch: Any, exact: Any) -> dict[str, Any]:
    """Return the logits [N, V] of a student close to the teacher, and of the pruned one."""
    import torch

    logits_NV = exact.head.logits(exact.hidden_NH)
    noise_NV = torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(0))
    pruned = local_teacher(options, "float32", "student").score(batch)
    return {"close": logits_NV + NOISE * noise_NV, "pruned": pruned.head.logits(pruned.hidden_NH)}


def local_teacher(options: argparse.Namespace, dtype: str, folder: str = "teacher") -> Any:
    """Return a teacher in this process."""
    import torch

    from gkd_trainer.teachers import FrozenTeacher

    teacher = FrozenTeacher(load(options.pair / folder, dtype), tokenizer_of(options))
    teacher.prepare(torch.device("cpu"))
    return teacher


def batch_of(options: argparse.Namespace) -> Any:
    """Return a batch of real text that is trained on from its second token on."""
    import torch

    from gkd_trainer.types import TokenBatch

    ids_BL = torch.tensor(token_rows(options, SEQUENCES, LENGTH))
    labels_BL = ids_BL.clone()
    labels_BL[:, 0] = -100
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    return TokenBatch(inputs, labels_BL, torch.zeros(SEQUENCES, dtype=torch.bool))


@contextmanager
def counted_answers() -> Iterator[Callable[[], int]]:
    """Count the bytes of the answers of vLLM servers; yield a function that returns how many came."""
    from gkd_trainer.vllm_client import VLLMServer

    lengths: list[int] = []
    request = VLLMServer._request

    def counting(self: Any, method: str, path: str, content: Any, read: Callable[[Any], Any]) -> Any:
        def counted(answer: Any) -> Any:
            lengths.append(len(answer.body))
            return read(answer)

        return request(self, method, path, content, counted)

    VLLMServer._request = counting
    try:
        yield lambda: sum(lengths)
    finally:
        VLLMServer._request = request


if __name__ == "__main__":
    main()

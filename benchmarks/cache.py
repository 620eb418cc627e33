"""An epoch from a cache against an epoch with the live teacher: time, bytes, and errors of the gradient.

    python -m benchmarks.cache --data GSM8K            # one thread on one core; about ten minutes

prints two tables for the SmolLM2 pair, in processor time, which excludes waiting, so that a busy machine changes it
little. The first has, for each kind, the time to write the cache, without loading the teacher; the bytes of its shards
per token trained on; and the time of `score` for the batches of an epoch. "error" is the relative error of the gradient
with respect to the student's logits, at β = 0, ½ and 1, against the states from which the cache was written, by
autograd in float64. The student's hidden states are the teacher's with noise, so that KL(p‖q) is 0.02.

The second table has whole epochs on the same rows in the same order, from the live teacher and from its cache, which
take turns.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pair import (
    announce,
    fitting_conversations,
    in_turns,
    load,
    our_trainer,
    parser,
    pin,
    ratio,
    table,
    tokenizer_of,
)

ARGUMENTS: dict[str, Any] = {"per_device_train_batch_size": 4, "max_length": 512, "max_new_tokens": 8, "lmbda": 0.0}
TOKENS_FOR_ERRORS = 128
DIVERGENCE = 0.02


@dataclass(frozen=True)
class Contender:
    """What is stored of a teacher in which dtype; without a kind, the teacher is live."""

    title: str
    dtype: str = "float32"
    kind: str | None = None
    top_k: int | None = None
    compression: str = "auto"


LIVE, CACHED = "live, float32", "hidden, float32"

CONTENDERS = (
    Contender(LIVE),
    Contender("live, bfloat16", "bfloat16"),
    Contender(CACHED, kind="hidden"),
    Contender("hidden, bfloat16, zstd", "bfloat16", kind="hidden"),
    Contender("hidden, bfloat16", "bfloat16", kind="hidden", compression="none"),
    Contender("hidden_int8, float32", kind="hidden_int8"),
    Contender("topk 64, float32", kind="topk", top_k=64),
)


@dataclass
class Cached:
    """A contender's teacher, and what its cache took: bytes per token, and seconds to write."""

    teacher: Any
    size: float | None = None
    seconds: float | None = None


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, ["kinds", "epochs"])
    options.add_argument("--rows", type=int, default=24)
    options = options.parse_args()
    pin(options)
    announce(options)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-cache-"))
    try:
        made = {each.title: prepared(options, each, folder / each.title.replace(", ", "-")) for each in CONTENDERS}
        if "kinds" in options.parts:
            print_kinds(options, made)
        if "epochs" in options.parts:
            print_epochs(options, made)
    finally:
        shutil.rmtree(folder)


def print_kinds(options: Any, made: Mapping[str, Cached]) -> None:
    """Print what each kind takes."""
    from gkd_trainer.types import TokenBatch

    trainer = our_trainer(options, ARGUMENTS, teacher=made[LIVE].teacher)
    trainer.train_dataset = trainer.train_dataset.select(range(options.rows))
    batches = [TokenBatch.from_inputs(dict(batch)) for batch in trainer.get_train_dataloader()]
    times = in_turns({name: scoring(each.teacher, batches) for name, each in made.items()}, options.repeats)
    errors = gradient_errors(options)
    rows = []
    for name, each in made.items():
        size = "" if each.size is None else f"{each.size:.0f}"
        once = "" if each.seconds is None else f"{each.seconds:.1f}"
        listed = " / ".join(f"{error:.2%}" for error in errors.get(name, []))
        rows.append([name, f"{statistics.median(times[name]):.2f}", size, once, listed])
    table(f"{options.rows} rows", ["", "score s", "bytes", "once s", "error"], rows)


def scoring(teacher: Any, batches: Sequence[Any]) -> Callable[[], float]:
    """Return a function that scores the batches, and returns the seconds."""
    teacher.prepare(batches[0].labels_BL.device, max_length=ARGUMENTS["max_length"])

    def score() -> float:
        began = time.process_time()
        for batch in batches:
            teacher.score(batch)
        return time.process_time() - began

    return score


def print_epochs(options: Any, made: Mapping[str, Cached]) -> None:
    """Print the time of whole epochs, the live teacher's and the cache's."""
    epoch(options, made[LIVE], max_steps=1)()  # compiles
    calls = {name: epoch(options, made[name], num_train_epochs=1) for name in (LIVE, CACHED)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            times[name].append(call())
    rows = [
        [name, f"{statistics.median(seconds):.1f}", f"{ratio(seconds, times[LIVE]):.2f}"]
        for name, seconds in times.items()
    ]
    table(f"an epoch of {options.rows} rows", ["", "seconds", "over live"], rows)


def rows_of(options: Any) -> Any:
    """Return the rows of the epoch."""
    return fitting_conversations(options, ARGUMENTS).select(range(options.rows))


def prepared(options: Any, contender: Contender, folder: Path) -> Cached:
    """Return a contender's teacher; write its cache first."""
    from gkd_trainer import CachedTeacher, FrozenTeacher, GKDConfig
    from gkd_trainer.trainer.caching import cache_predictions

    teacher = FrozenTeacher(load(options.pair / "teacher", contender.dtype), top_k=contender.top_k)
    if contender.kind is None:
        return Cached(teacher)
    config = GKDConfig(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **ARGUMENTS)
    began = time.process_time()
    manifest = cache_predictions(
        teacher,
        rows_of(options),
        folder,
        config,
        processing_class=tokenizer_of(options),
        kind=contender.kind,  # type: ignore[arg-type]
        compression=contender.compression,  # type: ignore[arg-type]
        batch_size=4,
    )
    seconds = time.process_time() - began
    size, positions = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("size", "positions"))
    return Cached(CachedTeacher(folder), size / positions, seconds)


def epoch(options: Any, cached: Cached, **length: Any) -> Callable[[], float]:
    """Return a function that trains, and returns the seconds."""

    def train() -> float:
        trainer = our_trainer(options, {**ARGUMENTS, **length}, teacher=cached.teacher)
        trainer.train_dataset = trainer.train_dataset.select(range(options.rows))
        began = time.process_time()
        trainer.train()
        return time.process_time() - began

    return train


def gradient_errors(options: Any) -> Mapping[str, list[float]]:
    """Return the errors of the kinds that store the states of a float32 teacher."""
    import torch

    from gkd_trainer.teachers.cache.kinds import HalfHidden, IntegerHidden, channel_statistics

    model, tokenizer = load(options.pair / "teacher", "float32"), tokenizer_of(options)
    hidden = []
    for row in rows_of(options):
        ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden.append(model.model(ids).last_hidden_state[0])
    hidden_NH = torch.cat(hidden)
    statistics_H = channel_statistics([(hidden_NH,)])
    hidden_NH = hidden_NH[:: max(1, len(hidden_NH) // TOKENS_FOR_ERRORS)]
    weight_VH = model.lm_head.weight.detach()
    teacher_NV = hidden_NH @ weight_VH.T
    noise_NH = torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(0)) * hidden_NH.std(dim=0)
    low, high = 0.0, 0.5
    for _ in range(8):
        middle = (low + high) / 2
        student_NV = (hidden_NH + middle * noise_NH) @ weight_VH.T
        log_p_NV = teacher_NV.log_softmax(-1)
        divergence = (log_p_NV.exp() * (log_p_NV - student_NV.log_softmax(-1))).sum(-1).mean()
        low, high = (low, middle) if divergence > DIVERGENCE else (middle, high)
    codecs = {
        "hidden, float32": IntegerHidden(torch.float32, *statistics_H, item_size=2),
        "hidden_int8, float32": IntegerHidden(torch.float32, *statistics_H, item_size=1),
        "float16": HalfHidden(torch.float16, hidden_NH.shape[1]),
    }
    errors = {}
    for name, codec in codecs.items():
        [stored_NH] = codec.decode(codec.encode((hidden_NH,)), len(hidden_NH))
        stored_NV = stored_NH.float() @ weight_VH.T
        errors[name] = [error(teacher_NV, stored_NV, student_NV, beta) for beta in (0.0, 0.5, 1.0)]
    print("as float16:", ", ".join(f"{each:.2%}" for each in errors["float16"]))
    return errors


def error(teacher_NV: Any, stored_NV: Any, student_NV: Any, beta: float) -> float:
    """Return the relative error of the gradient with the stored teacher, by autograd in float64."""
    import torch

    from gkd_trainer.divergence.reference import reference_jsd

    gradients = []
    for logits_NV in (teacher_NV, stored_NV):
        leaf_NV = student_NV.double().requires_grad_()
        values_N = reference_jsd(leaf_NV, logits_NV.double(), beta=beta)
        gradients.append(torch.autograd.grad(values_N.sum(), leaf_NV)[0])
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


if __name__ == "__main__":
    main()

"""The memory of a student that is its own teacher, beside that of a second copy of it.

    python -m benchmarks.self_teacher --data GSM8K        # one thread on one core; some minutes

prints one table: SmolLM2-135M with a LoRA adapter on all linear layers learns from itself, off-policy, 4 sequences a
step. Each teacher has its own process, since memory is that of the process. "models GB" is what the process grew by as
the models were loaded and the trainer was built, "peak GB" the peak of its resident set in the steps, without what it
held before; on CUDA, both are what torch allocated. "s per step" is the median. The weights of the average of the
adapter are `average MB`; the adapter's own are in the title.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from benchmarks.pair import announce, common_arguments, fitting_conversations, load, parser, pin, table, tokenizer_of

TEACHERS = {"a second copy": None, "SelfTeacher, base": "base", "SelfTeacher, ema": "ema"}
ARGUMENTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 512, "lmbda": 0.0}


@dataclass(frozen=True)
class Figures:
    """Bytes, and seconds of each step."""

    models: int
    peak: int
    average: int
    adapter: int
    seconds: list[float]


def main() -> None:
    """Measure each teacher, and print the table."""
    options = parse_options()
    pin(options)
    announce(options)
    figures = {title: measured(options, title) for title in TEACHERS}
    copy = figures["a second copy"]
    rows = [
        [
            title,
            f"{each.models / 1e9:.2f}",
            f"{each.peak / 1e9:.2f}",
            f"{(each.peak - copy.peak) / 1e9:+.2f}",
            f"{each.average / 1e6:.1f}",
            f"{median(each.seconds):.2f}",
        ]
        for title, each in figures.items()
    ]
    title = f"LoRA of rank {options.rank} ({copy.adapter / 1e6:.1f} MB), {options.steps} steps"
    table(title, ["teacher", "models GB", "peak GB", "to the copy", "average MB", "s per step"], rows)


def measured(options: argparse.Namespace, title: str) -> Figures:
    """Return what a teacher's process measured."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=measure, args=(theirs, options, title))
    process.start()
    figures: Figures = ours.recv()
    process.join()
    return figures


def measure(connection: Connection, options: argparse.Namespace, title: str) -> None:
    """Train with a teacher, and send the figures."""
    pin(options)
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback

    from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer, SelfTeacher

    rows = fitting_conversations(options, ARGUMENTS)
    before = held_bytes()
    source = TEACHERS[title]
    teacher: Any = FrozenTeacher(load(options.pair / "teacher", "float32")) if source is None else SelfTeacher(source)
    trainer = GKDTrainer(
        model=load(options.pair / "teacher", "float32"),
        teacher=teacher,
        args=GKDConfig(
            **{**common_arguments(), **ARGUMENTS, "max_steps": options.steps, "ce_weight": 0.5, "bf16": False}
        ),
        train_dataset=rows,
        processing_class=tokenizer_of(options),
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[-1] += time.perf_counter()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Times)  # the last, so the average's update is counted
    gc.collect()
    models = held_bytes() - before
    reset_peak()
    trainer.train()
    average = teacher.state() if source == "ema" else {}
    adapter = sum(weight.nbytes for weight in trainer.model.parameters() if weight.requires_grad)
    connection.send(
        Figures(models, peak_bytes() - before, sum(each.nbytes for each in average.values()), adapter, times[1:])
    )


def held_bytes() -> int:
    """Return the bytes that the process holds now."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes that it has held since `reset_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    options = parser(__doc__, ["memory"])
    options.add_argument("--steps", type=int, default=16, help="optimizer steps; the average is cut at the thirteenth")
    options.add_argument("--rank", type=int, default=16)
    return options.parse_args()


if __name__ == "__main__":
    main()

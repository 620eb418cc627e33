"""Whole training steps, ours and those of TRL's GKDTrainer: seconds, where they go, and peak memory.

    python -m benchmarks.step --data GSM8K            # one thread on one core; about 40 minutes
    python -m benchmarks.step --parts lora --repeats 1

prints one table per part, for the SmolLM2 pair: off-policy steps, on-policy steps, and off-policy steps of a LoRA
student; with `--cuda`, on a GPU. Every contender has its own process, since mixed precision is a state of the process
and memory is its size. The contenders take turns on the same core and the same rows. A turn is one `train` of `--steps`
optimizer steps, measured from its `on_train_begin` to its `on_train_end`; a first turn, which compiles, is not counted.
Ratios are medians of the turns' ratios. TRL runs with its best settings: the KV cache on, no gradient checkpointing.

Of a step, "rollout" is the generation; "teacher" the teacher's forward (TRL's to logits, ours to hidden states);
"student" the rest of `training_step` (forward, divergence, backward); "rest" everything else: optimizer, clipping,
data. On CUDA the first three are measured between events. "peak GB" is the peak of the resident set during a turn, on
CUDA that of torch's tensors. "added" is the part that was not there when the turn began, as libraries, models and the
optimizer's state were. Beside each is its ratio to TRL's. "CPU s" is processor time, which excludes waiting: where it
is well below the seconds, the cores were shared, and its ratio is more reliable. TRL also trains on the newline that
the chat template puts after a turn, hence its additional tokens.

Shapes: B batch, L length.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.clocks import measured_memory
from benchmarks.pair import ON_POLICY, announce, in_turns, our_trainer, parser, pin, ratio, table, trl_trainer

SPLIT = ("rollout", "teacher", "student")
OFF_POLICY = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 512, "lmbda": 0.0}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Contender:
    """A trainer and its own settings; `bf16` is autocast, which is TRL's default."""

    title: str
    is_trl: bool = False
    teacher_dtype: str = "float32"
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"bf16": False})


@dataclass(frozen=True)
class Part:
    """Contenders that train alike. The others are compared with the first."""

    title: str
    arguments: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    lora: Mapping[str, Any] | None = None


TRL = Contender("TRL GKDTrainer, float32", is_trl=True)
OURS = Contender("ours, float32")
AUTOCAST = (
    Contender("TRL GKDTrainer, bf16 autocast", is_trl=True, arguments={"bf16": True}),
    Contender("ours, bf16 autocast", arguments={"bf16": True}),
)
HALF_TEACHER = (
    Contender("TRL GKDTrainer, teacher in bf16", is_trl=True, teacher_dtype="bfloat16"),
    Contender(
        "ours, teacher and gradient products in bf16",
        teacher_dtype="bfloat16",
        arguments={"bf16": False, "loss_product_dtype": "bfloat16"},
    ),
)
PARTS = {
    "off-policy": Part("Off-policy steps: 4 sequences", OFF_POLICY, (TRL, OURS, *HALF_TEACHER, *AUTOCAST)),
    "on-policy": Part(
        "On-policy steps: 2 sequences × accumulation 4, 96 new tokens, transformers.generate",
        ON_POLICY,
        (TRL, OURS, *AUTOCAST),
    ),
    "lora": Part("Off-policy steps of a LoRA student: 4 sequences, rank 16", OFF_POLICY, (TRL, OURS), LORA),
}


@dataclass(frozen=True)
class Turn:
    """The measurements of one turn: seconds and tokens per step, and the bytes of the process, or of a GPU."""

    seconds: float
    cpu_seconds: float
    split: Mapping[str, float]
    peak_bytes: int
    bytes_before: int
    sequences: float
    tokens: float
    trained_tokens: float


def main() -> None:
    """Measure the parts that were asked for."""
    options = parse_options()
    pin(options)
    announce(options)
    for name in options.parts:
        part = PARTS[name]
        with ExitStack() as stack:
            calls = {
                contender.title: stack.enter_context(worker(options, name, index))
                for index, contender in enumerate(part.contenders)
                if not options.only_float32 or contender in (TRL, OURS)
            }
            report(part, in_turns(calls, options.repeats), options)


def report(part: Part, turns: Mapping[str, list[Turn]], options: argparse.Namespace) -> None:
    """Print the table of a part."""
    of_peer, *_ = turns.values()
    peer_peak, peer_added = _memory(of_peer)
    rows = []
    for name, of_name in turns.items():
        peak, added = _memory(of_name)
        middle = partial(_median, of_name)
        rest = middle(lambda turn: turn.seconds - sum(turn.split.values()))
        rows.append(
            [
                name,
                f"{middle(lambda turn: turn.seconds):.2f}",
                f"{ratio([turn.seconds for turn in of_peer], [turn.seconds for turn in of_name]):.2f}",
                f"{middle(lambda turn: turn.cpu_seconds):.2f}",
                f"{ratio([turn.cpu_seconds for turn in of_peer], [turn.cpu_seconds for turn in of_name]):.2f}",
                *(f"{middle(lambda turn, key=key: turn.split[key]):.2f}" for key in SPLIT),
                f"{rest:.2f}",
                f"{peak / 1e9:.2f}",
                f"{peak / peer_peak:.2f}",
                f"{added / 1e9:.2f}",
                f"{added / peer_added:.2f}",
                f"{middle(lambda turn: turn.trained_tokens):.0f}",
                f"{middle(lambda turn: turn.tokens / turn.sequences):.0f}",
            ]
        )
    title = f"{part.title}, beta {options.beta}, {options.steps} step(s) per turn"
    memory = ("peak GB", "of TRL's", "added", "of TRL's")
    table(
        title,
        ["", "s per step", "× faster", "CPU s", "× faster", *SPLIT, "rest", *memory, "tokens trained", "length"],
        rows,
    )


@contextmanager
def worker(options: argparse.Namespace, part: str, index: int) -> Iterator[Callable[[], Turn]]:
    """Start a process with a contender's trainer, and yield a function that makes it take a turn."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, options, part, index))
    process.start()
    theirs.close()

    def take_turn() -> Turn:
        ours.send(True)
        turn: Turn = ours.recv()
        return turn

    try:
        yield take_turn
        ours.send(False)
        process.join()
    finally:
        process.kill()


def serve(connection: Connection, options: argparse.Namespace, part: str, index: int) -> None:
    """Build a contender's trainer, and take a turn whenever asked."""
    pin(options)
    trainer, stopwatch = build(options, PARTS[part], PARTS[part].contenders[index])
    while connection.recv():
        connection.send(take_turn(trainer, stopwatch, options.steps))


def build(options: argparse.Namespace, part: Part, contender: Contender) -> tuple[Any, Stopwatch]:
    """Return a contender's trainer, and the stopwatch that times it."""
    from peft import LoraConfig

    trainer = (trl_trainer if contender.is_trl else our_trainer)(
        options,
        {**part.arguments, **contender.arguments, "beta": options.beta, "max_steps": options.steps},
        teacher_dtype=contender.teacher_dtype,
        peft_config=None if part.lora is None else LoraConfig(**part.lora),
    )
    return trainer, timed(trainer, is_trl=contender.is_trl)


def timed(trainer: Any, *, is_trl: bool = False) -> Stopwatch:
    """Return a stopwatch that measures the trainer whenever it trains."""
    from transformers import PrinterCallback

    stopwatch = Stopwatch(trainer.args.device)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stopwatch.callback())
    trainer.compute_loss = stopwatch.counting(trainer.compute_loss)
    if is_trl:
        trainer.generate_on_policy_outputs = stopwatch.measured("rollout", trainer.generate_on_policy_outputs)
        trainer.teacher_model.forward = stopwatch.measured("teacher", trainer.teacher_model.forward)
        # It includes the two above, which our `seconds_student` does not.
        trainer.training_step = stopwatch.measured("step", trainer.training_step)
    return stopwatch


def take_turn(trainer: Any, stopwatch: Stopwatch, steps: int) -> Turn:
    """Train for some steps."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that is already free counts in neither figure
    with measured_memory(trainer.args.device) as memory:
        trainer.train()
    sums = {name: amount / steps for name, amount in stopwatch.read().items()}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    if "seconds_student" in logged[0]:
        # Steps that generate nothing log no seconds of rollouts.
        split = {name: sum(entry.get(f"seconds_{name}", 0.0) for entry in logged) / steps for name in SPLIT}
    else:
        rollout, teacher = sums.get("rollout", 0.0), sums["teacher"]
        split = {"rollout": rollout, "teacher": teacher, "student": sums["step"] - rollout - teacher}
    return Turn(
        sums["train"],
        sums["train_cpu"],
        split,
        memory.peak,
        memory.before,
        sums["sequences"],
        sums["tokens"],
        sums["trained_tokens"],
    )


class Stopwatch:
    """Seconds and tokens by name, added up while a trainer trains; on CUDA, `measured` calls are timed by events."""

    def __init__(self, device: torch.device) -> None:
        from gkd_trainer.report.metrics import Stopwatch as Clock

        self._device, self._clock = device, Clock(device)
        self._sums: dict[str, float | torch.Tensor] = {}

    def read(self) -> dict[str, float]:
        """Return the sums since the last call."""
        sums, self._sums = self._sums, {}
        return {**{name: float(amount) for name, amount in sums.items()}, **self._clock.read()}

    def callback(self) -> Any:
        """Return a callback that adds the seconds of the training loop, without what `train` does around it."""
        from transformers import TrainerCallback

        stopwatch = self

        class TimeOfLoop(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                stopwatch._wait()
                stopwatch._add("train", -time.perf_counter())
                stopwatch._add("train_cpu", -time.process_time())

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                stopwatch._wait()
                stopwatch._add("train", time.perf_counter())
                stopwatch._add("train_cpu", time.process_time())

        return TimeOfLoop()

    def measured(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call wrapped so that its seconds are added to `name`."""

        def measured_call(*args: Any, **kwargs: Any) -> Any:
            with self._clock.measure(name):
                return call(*args, **kwargs)

        return measured_call

    def counting(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call wrapped so that the tokens it gets are counted."""

        def counting_call(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels_BL = inputs["labels"]
            self._add("sequences", len(labels_BL))
            # Read later, so as not to wait for the device here.
            self._add("tokens", inputs["attention_mask"].sum())
            self._add("trained_tokens", (labels_BL[:, 1:] != -100).sum())
            return compute_loss(model, inputs, *args, **kwargs)

        return counting_call

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _add(self, name: str, amount: float | torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + amount


def _memory(turns: list[Turn]) -> tuple[float, float]:
    """Return the peak, and the part of it that its turn added."""
    highest = max(turns, key=lambda turn: turn.peak_bytes)
    return highest.peak_bytes, highest.peak_bytes - highest.bytes_before


def _median(turns: list[Turn], figure: Callable[[Turn], float]) -> float:
    return statistics.median(map(figure, turns))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    options = parser(__doc__, list(PARTS))
    options.add_argument("--steps", type=int, default=2, help="optimizer steps per turn")
    options.add_argument("--beta", type=float, default=0.5, help="0.5 is the default of both trainers")
    options.add_argument("--cuda", action="store_true", help="train on the GPU")
    options.add_argument("--only-float32", action="store_true", help="leave out the contenders that use bf16")
    return options.parse_args()


if __name__ == "__main__":
    main()

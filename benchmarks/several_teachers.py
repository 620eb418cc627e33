"""The cost of several teachers: training steps with three of them, relative to the same steps with one.

    python -m benchmarks.several_teachers --data GSM8K           # one thread on one core; about 15 minutes
    python -m benchmarks.several_teachers --parts routed --repeats 1

All contenders train the same student on the same tokens, and take turns in one process; a turn is one `train` of
`--steps` optimizer steps of `--batch-size` sequences. The teachers are copies of the pair's, so that each costs the
same. "routed" gives each sample one of three teachers in turn; "summed" compares every sample with all three. A ratio
is the median of the turns' ratios to one teacher. "CPU s" is processor time, which excludes waiting: where it is well
below the seconds, the cores were shared, and its ratio is more reliable.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.pair import (
    announce,
    common_arguments,
    fitting_conversations,
    in_turns,
    load,
    parser,
    pin,
    ratio,
    table,
    tokenizer_of,
)

NAMES = ("first", "second", "third")
PARTS = {"routed": "three, one for each sample", "summed": "three, all for each sample"}


@dataclass(frozen=True)
class Turn:
    """The measurements of one turn, per step: seconds, processor time, and seconds of the teachers and the student."""

    seconds: float
    cpu_seconds: float
    teacher: float
    student: float
    tokens: float


def main() -> None:
    """Measure the parts that were asked for beside one teacher."""
    options = parse_options()
    pin(options)
    announce(options)
    student = load(options.pair / "student", "float32")
    teachers = {name: load(options.pair / "teacher", "float32") for name in NAMES}
    calls = {"one": turns_of(options, "one", student, teachers)}
    calls |= {PARTS[part]: turns_of(options, part, student, teachers) for part in options.parts}
    turns = in_turns(calls, options.repeats)
    rows = []
    for name, of_name in turns.items():
        rows.append([name])
        for figure in ("seconds", "cpu_seconds", "teacher", "student"):
            ours, of_one = ([getattr(turn, figure) for turn in each] for each in (of_name, turns["one"]))
            rows[-1] += [f"{statistics.median(ours):.2f}", f"{ratio(ours, of_one):.3f}"]
        rows[-1].append(f"{of_name[0].tokens:.0f}")
    header = ["teachers"]
    for figure in ("s per step", "CPU s", "scoring s", "student s"):
        header += [figure, "of one"]
    table(f"Steps of {options.batch_size} sequences", [*header, "tokens trained"], rows)


def turns_of(options: argparse.Namespace, part: str, student: Any, models: dict[str, Any]) -> Callable[[], Turn]:
    """Return a function that takes a turn with a trainer of its own; all trainers share the models."""
    from transformers import PrinterCallback

    from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer, RoutedTeachers, WeightedTeachers

    teachers = {name: FrozenTeacher(model, tokenizer_of(options)) for name, model in models.items()}
    arguments: dict[str, Any] = {"lmbda": 0.0, "max_length": 512, "max_new_tokens": 128, "max_steps": options.steps}
    arguments["optim"] = "sgd"  # has no state, which would take the memory of three students
    rows = fitting_conversations(options, arguments)
    rows = rows.add_column("teacher", [NAMES[index % 3] for index in range(len(rows))])
    if part == "one":
        teacher: Any = teachers[NAMES[0]]
    else:
        teacher = RoutedTeachers(teachers) if part == "routed" else WeightedTeachers(teachers)
    trainer = GKDTrainer(
        model=student,
        teacher=teacher,
        args=GKDConfig(**common_arguments(), **arguments, per_device_train_batch_size=options.batch_size),
        train_dataset=rows,
        processing_class=tokenizer_of(options),
    )
    trainer.remove_callback(PrinterCallback)

    def take_turn() -> Turn:
        began, cpu_began = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        split = (sum(entry[f"seconds_{name}"] for entry in logged) for name in ("teacher", "student"))
        tokens = sum(
            entry["tokens_per_second"] * (entry["seconds_teacher"] + entry["seconds_student"]) for entry in logged
        )
        return Turn(*(figure / options.steps for figure in (seconds, cpu_seconds, *split, tokens)))

    return take_turn


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    options = parser(__doc__, list(PARTS))
    options.add_argument("--steps", type=int, default=2, help="optimizer steps per turn")
    options.add_argument("--batch-size", type=int, default=6, help="sequences per step")
    return options.parse_args()


if __name__ == "__main__":
    main()

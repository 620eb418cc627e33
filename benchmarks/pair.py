"""What the benchmarks on the SmolLM2 pair share: the models, real rows, both trainers, turns and tables."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parents[1]

ON_POLICY = {
    "lmbda": 1.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_new_tokens": 96,
    "max_length": 512,
}
"""Two sequences × accumulation 4, all of them the student's."""


def parser(description: str | None, parts: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pair", type=Path, default=ROOT / ".cache" / "smollm2", help="see examples/smollm2.py")
    options.add_argument("--data", help="a folder with GSM8K's train.jsonl; by default the demo's conversations")
    options.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--cores", type=int, nargs="+", default=[0], help="the cores that everything runs on")
    return options


def pin(options: argparse.Namespace) -> None:
    """Keep this process, and those that it starts, on the cores and threads of the options."""
    os.sched_setaffinity(0, set(options.cores))
    os.environ.update(OMP_NUM_THREADS=str(options.threads), VLLM_NO_USAGE_STATS="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(options.threads)
    disable_progress_bar()


def announce(options: argparse.Namespace) -> None:
    """Print what the figures that follow were measured on."""
    where = f"cores {sorted(os.sched_getaffinity(0))}, {options.threads} thread(s)"
    print(f"{where}, medians of {options.repeats} turn(s), load average {os.getloadavg()[0]:.1f}", flush=True)


def load(folder: Path, dtype: str) -> Any:
    """Return a causal LM in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def tokenizer_of(options: argparse.Namespace) -> Any:
    """Return the tokenizer of the pair."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.pair / "teacher")


def conversations(options: argparse.Namespace) -> Any:
    """Return rows of `messages`: GSM8K where `--data` names it, else the demo's."""
    from datasets import Dataset

    from gkd_trainer.data import gsm8k

    if options.data:
        return gsm8k.load(options.data, "train", "conversation", limit=256)
    lines = (ROOT / "examples" / "demo_data" / "teacher_answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": answer["prompt"]},
                    {"role": "assistant", "content": answer["completion"]},
                ]
            }
            for answer in answers
        ]
    )


def fitting_conversations(options: argparse.Namespace, arguments: Mapping[str, Any]) -> Any:
    """Return the rows that neither trainer cuts or drops: TRL's stops at a completion that fills `max_length`."""
    tokenizer = tokenizer_of(options)
    generated = arguments["max_new_tokens"] if arguments["lmbda"] > 0 else 0

    def fits(row: Mapping[str, Any]) -> bool:
        whole, prompt = (
            len(tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, return_dict=True)["input_ids"])
            for messages, is_prompt in ((row["messages"], False), (row["messages"][:-1], True))
        )
        return max(whole, prompt + generated) <= arguments["max_length"]

    return conversations(options).filter(fits)


def our_trainer(
    options: argparse.Namespace,
    arguments: Mapping[str, Any],
    *,
    teacher_dtype: str = "float32",
    teacher: Any = None,
    rollouts: Any = None,
    peft_config: Any = None,
) -> Any:
    """Return our trainer on the pair; `arguments` are of its configuration, `teacher` takes the model's place."""
    from gkd_trainer import GKDConfig, GKDTrainer

    return GKDTrainer(
        model=load(options.pair / "student", "float32"),
        teacher_model=load(options.pair / "teacher", teacher_dtype) if teacher is None else None,
        args=GKDConfig(**common_arguments(), **arguments),
        train_dataset=fitting_conversations(options, arguments),
        processing_class=tokenizer_of(options),
        teacher=teacher,
        rollouts=rollouts,
        peft_config=peft_config,
    )


def trl_trainer(
    options: argparse.Namespace,
    arguments: Mapping[str, Any],
    *,
    teacher_dtype: str = "float32",
    peft_config: Any = None,
) -> Any:
    """Return TRL's trainer on the pair, with its best settings: the KV cache on, which checkpointing would forbid."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        model=load(options.pair / "student", "float32"),
        teacher_model=load(options.pair / "teacher", teacher_dtype),
        args=GKDConfig(**common_arguments(), gradient_checkpointing=False, **arguments),
        train_dataset=fitting_conversations(options, arguments),
        processing_class=tokenizer_of(options),
        peft_config=peft_config,
    )


def common_arguments() -> dict[str, Any]:
    """Return the options that both trainers take, whatever they are to do: the same rows in the same order."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "temperature": 1.0,
        "learning_rate": 1e-6,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def in_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Return what each call returns, made in turns after one that is not counted."""
    for call in calls.values():
        call()
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results


def seconds_of(call: Callable[[], object]) -> Callable[[], float]:
    """Return a call that returns how long this one takes."""

    def timed() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return timed


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    printed = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        printed.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        printed.add_row(*row)
    Console(width=180).print(printed)

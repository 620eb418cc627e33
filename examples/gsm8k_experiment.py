r"""Compare ways to distil on GSM8K by the test problems solved: arms as in docs/evidence.md on a real pair, for a GPU.

    python examples/gsm8k_experiment.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

Every arm starts from the same student, trains for the same number of steps, and adds a line of JSON to
OUTPUT_DIR/results.jsonl. Arms that are already there with the same options are left out, so the same command continues
after an interruption.
`fresh-*` learns from new samples by the teacher in every step: without it, nothing can be said about on-policy.
`--data` also takes a folder with train.jsonl and test.jsonl; `--vllm` generates with vLLM in this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k

ARMS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"lmbda": 0.0, "ce_weight": 1.0},
    **{f"fixed-{beta:g}": {"lmbda": 0.0, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    **{f"fresh-{beta:g}": {"lmbda": 0.0, "seq_kd": True, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    **{f"own-{beta:g}": {"lmbda": 1.0, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    "mixed-0.5": {"lmbda": 0.5, "beta": 0.5},
    "rising-0.5": {"lmbda": 0.0, "lmbda_end": 1.0, "lmbda_schedule": "linear", "beta": 0.5},
}
"""Options of GKDConfig by the name of an arm; the number is β."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    args = parse_args(argv)
    results = Path(args.output_dir) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", "arms", "seeds")}
    for seed in range(args.seeds):
        for arm in args.arms:
            if not any((line["arm"], line["seed"]) == (arm, seed) for line in lines_of(results, options)):
                line = {"arm": arm, "seed": seed, "options": options, **trained(args, ARMS[arm], seed)}
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print_table(lines_of(results, options))


def trained(args: argparse.Namespace, options: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train one student; return its accuracy, agreement and acceptance on test problems, and the seconds.

    The divergence is not among them: each arm evaluates its own.
    """
    set_seed(seed)
    generates = options["lmbda"] > 0 or "lmbda_end" in options
    config = GKDConfig(
        output_dir=str(Path(args.output_dir) / "run"),
        max_new_tokens=args.max_new_tokens,
        max_length=256 + args.max_new_tokens,
        use_vllm=args.vllm and generates,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        **options,
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
        eval_dataset=gsm8k.load(args.data, "test", "conversation", args.num_eval),
    )
    try:
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        measured = trainer.evaluate()
        return {
            "accuracy": accuracy(args, trainer),
            "eval_top_token_agreement": measured["eval_top_token_agreement"],
            "eval_acceptance": measured["eval_acceptance"],
            "seconds": seconds,
        }
    finally:
        trainer.rollouts.close()  # a vLLM engine would keep its memory, and break that of the next arm


def accuracy(args: argparse.Namespace, trainer: GKDTrainer) -> float:
    """Return the share of test problems that the student solves greedily."""
    problems = gsm8k.load(args.data, "test", "prompt", args.num_eval)
    tokenizer, engine = trainer.processing_class, trainer.rollouts
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in problems
    ]
    engine.sync(trainer.model)
    completions = engine.generate(prompts, engine.greedy_sampling(args.max_new_tokens), seeds=range(len(prompts)))
    solutions = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    return sum(map(gsm8k.is_correct, solutions, problems["ground_truth"])) / len(problems)


def lines_of(results: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results so far with these options."""
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    return [line for line in lines if line.get("options") == options]


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print the means over seeds by arm, with the lowest and highest accuracy."""
    table = Table("arm", "seeds", "accuracy", "lowest to highest", "agreement", "acceptance", "seconds")
    for arm in ARMS:
        of_arm = [line for line in lines if line["arm"] == arm]
        if not of_arm:
            continue
        found = [line["accuracy"] for line in of_arm]
        means = [
            sum(line[name] for line in of_arm) / len(of_arm)
            for name in ("eval_top_token_agreement", "eval_acceptance", "seconds")
        ]
        table.add_row(
            arm,
            str(len(of_arm)),
            f"{sum(found) / len(found):.3f}",
            f"{min(found):.3f} to {max(found):.3f}",
            *(f"{mean:.3f}" for mean in means),
        )
    Console().print(table)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="gsm8k-experiment")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=256)
    parser.add_argument("--vllm", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

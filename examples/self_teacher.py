"""A student that teaches itself: it answers GSM8K's problems, and reads its answers again next to the solution.

    python examples/self_teacher.py --student Qwen/Qwen2.5-0.5B-Instruct

There is no second model. The teacher is the student's own base model, its LoRA adapter off, after another prompt: the
problem, its solution, and the answer that the student gave. So it knows which of the student's tokens to prefer, and
the adapter learns to prefer them without seeing the solution. `--source ema` uses the average of the adapter instead
of none. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from gkd_trainer import ContextTeacher, GKDConfig, GKDTrainer, SelfTeacher
from gkd_trainer.data import gsm8k

PROMPT = """{question}

A correct solution:
{solution}

A student's answer, which is {verdict}:
{answer}

Now answer the problem in your own words."""


def with_solution(row: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    """Return the teacher's prompt for an answer of the student."""
    question, solution = row["messages"]
    verdict = "right" if gsm8k.is_correct(answer, row["ground_truth"]) else "wrong"
    text = PROMPT.format(question=question["content"], solution=solution["content"], verdict=verdict, answer=answer)
    return [{"role": "user", "content": text}]


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save an adapter by self-distillation, and print how far apart teacher and student were."""
    args = parse_args(argv)
    rows = gsm8k.load(args.data, "train", "conversation", limit=args.num_rows)
    rows = rows.add_column("row_key", list(range(len(rows))))
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=1.0,
        beta=0.5,
        max_new_tokens=args.max_new_tokens,
        max_length=256 + args.max_new_tokens,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher=ContextTeacher(SelfTeacher(args.source), with_solution, rows),
        args=config,
        train_dataset=rows,
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    print("Divergence of the student from itself with the solution:")
    for entry in trainer.state.log_history:
        if "divergence_on_policy" in entry:
            print(f"  step {entry['step']}: {entry['divergence_on_policy']:.4f}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--source", default="base", help="base, or ema")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--num_rows", type=int, help="how many rows to train on; by default all")
    parser.add_argument("--output_dir", default="self-gsm8k")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

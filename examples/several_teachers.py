"""Two teachers of one student: mathematics from one, conversation from the other, off-policy.

    python examples/several_teachers.py --student Qwen/Qwen2.5-0.5B-Instruct \
        --math_teacher Qwen/Qwen2.5-Math-1.5B-Instruct --chat_teacher Qwen/Qwen2.5-7B-Instruct

Both teachers must have the student's tokenizer. Each row names its teacher in the column `teacher`, and is compared
only with that teacher, so two cost about as much as one. The divergence from each, on rows that are not trained
on, is printed before and after. On a GPU, --teacher_offload keeps only the teacher at work in its memory. `--data` also
takes a folder with train.jsonl; the conversations are the demo's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k

CONVERSATIONS = Path(__file__).parent / "demo_data" / "teacher_answers.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Train from both teachers, and print the divergence from each before and after."""
    args = parse_args(argv)
    train_rows, eval_rows = rows_of_both(args)
    config = GKDConfig(
        output_dir=args.output_dir,
        teachers={"math": args.math_teacher, "chat": args.chat_teacher},
        teacher_offload=args.teacher_offload,
        lmbda=0.0,
        beta=0.0,
        max_length=args.max_length,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(model=args.student, args=config, train_dataset=train_rows, eval_dataset=eval_rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    for name in ("math", "chat"):
        metric = f"eval_divergence_teacher_{name}"
        print(f"Divergence from the {name} teacher: {before[metric]:.3f} before, {after[metric]:.3f} after")


def rows_of_both(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and to evaluate on, each of both kinds, with their teachers."""
    maths = gsm8k.load(args.data, "train", "conversation").remove_columns("ground_truth")
    chats = load_dataset("json", data_files=str(CONVERSATIONS), split="train")
    chats = chats.map(as_conversation, remove_columns=chats.column_names)
    kinds = [rows.add_column("teacher", [name] * len(rows)) for name, rows in (("math", maths), ("chat", chats))]
    held_out = [rows.select(range(args.num_eval)) for rows in kinds]
    trained_on = [rows.select(range(args.num_eval, len(rows))) for rows in kinds]
    return concatenate_datasets(trained_on), concatenate_datasets(held_out)


def as_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt and its answer as a conversation."""
    turns = (("user", row["prompt"]), ("assistant", row["completion"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--math_teacher", default="Qwen/Qwen2.5-Math-1.5B-Instruct")
    parser.add_argument("--chat_teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--teacher_offload", action="store_true", help="keep only the teacher at work on the GPU")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="several-teachers")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--num_eval", type=int, default=16, help="rows of each kind to evaluate on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

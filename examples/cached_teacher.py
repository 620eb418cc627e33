"""Off-policy distillation from a cache: the teacher scores the data once, then frees its memory for the student.

    python examples/cached_teacher.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

The same on the command line: `gkd-trainer cache`, then `gkd-trainer train --teacher_cache_dir`. A second run finds the
rows in the cache, and scores none again. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from gkd_trainer import CachedTeacher, FrozenTeacher, GKDConfig, GKDTrainer, cache_predictions
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Cache the teacher's predictions, train from them, and print the size of the cache and the first and last loss."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=0.0,
        beta=0.0,
        max_length=args.max_length,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=1,
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    rows = gsm8k.load(args.data, "train", "conversation", limit=args.num_train)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    cache = Path(args.output_dir) / "cache"
    manifest = cache_predictions(
        FrozenTeacher.from_pretrained(args.teacher), rows, cache, config, processing_class=tokenizer
    )
    size, positions = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("size", "positions"))
    print(f"{positions} tokens in {size / 1e6:.1f} MB")

    trainer = GKDTrainer(
        model=args.student, args=config, train_dataset=rows, processing_class=tokenizer, teacher=CachedTeacher(cache)
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"Forward KL per token: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--num_train", type=int, default=1000)
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--output_dir", default="cached-teacher-gsm8k")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

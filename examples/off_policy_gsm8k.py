"""Off-policy distillation on GSM8K: the student imitates the teacher's distribution on the data's solutions.

    python examples/off_policy_gsm8k.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

lmbda=0 generates nothing, and beta=0 is the forward KL: classic word-level distillation. The divergence on held-out
problems is measured before and after training. `--data` also takes a folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the divergence on held-out problems before and after."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=0.0,
        beta=0.0,
        max_length=args.max_length,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=10,
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
        eval_dataset=gsm8k.load(args.data, "test", "conversation", limit=args.num_eval),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"Forward KL per token on {args.num_eval} test problems: {before:.4f} before, {after:.4f} after")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="off-policy-gsm8k")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--num_eval", type=int, default=100)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

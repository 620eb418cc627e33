"""A teacher with another tokenizer: half of the samples come from GSM8K's solutions, half from the student.

    python examples/other_vocabulary.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher google/gemma-3-4b-it

The teacher reads the questions in its own chat template, and both are compared where each begins a token at the same
byte. The share of the tokens compared is printed. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print how much was compared."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        teacher_vocabulary_mode=args.mode,
        lmbda=0.5,
        beta=0.5,
        max_new_tokens=args.max_new_tokens,
        max_length=512 + args.max_new_tokens,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
    )
    trainer.train()
    trainer.save_model()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(
                f"step {entry['step']}: loss {entry['loss']:.4f}, compared {entry.get('compared_share', 1.0):.3f} of "
                f"the tokens; {entry['teacher_matched_mass']:.3f} of the teacher's probability is on tokens that match"
            )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="google/gemma-3-4b-it")
    parser.add_argument("--mode", default="matched", choices=["matched", "next_byte", "uld", "gold"])
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="other-vocabulary-gsm8k")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

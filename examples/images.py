"""A vision-language student of a larger model, on pictures of shapes, half on-policy.

    python examples/images.py --teacher HuggingFaceTB/SmolVLM-500M-Instruct

The pictures are drawn here; your own rows need the same columns. On half of the samples the student learns from the
caption, on the others from a description that it samples.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from gkd_trainer import GKDConfig, GKDTrainer

COLOURS = ("red", "green", "blue", "yellow", "black")
SHAPES = ("ellipse", "rectangle")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the divergence and the acceptance on held-out pictures before and after."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=0.5,
        beta=0.5,
        max_new_tokens=args.max_new_tokens,
        max_length=None,  # a picture is some hundred tokens
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=rows(args.num_train, args.size, seed=0),
        eval_dataset=rows(args.num_eval, args.size, seed=1),
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_acceptance"):
        print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")


def rows(count: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Return conversations about pictures of one shape each."""
    numbers = random.Random(seed)
    found = []
    for _ in range(count):
        colour, shape = numbers.choice(COLOURS), numbers.choice(SHAPES)
        picture = Image.new("RGB", (size, size), "white")
        left, top = (numbers.randrange(size // 2) for _ in range(2))
        getattr(ImageDraw.Draw(picture), shape)((left, top, left + size // 2, top + size // 2), fill=colour)
        messages = [
            {"role": "user", "content": "What is in the picture?"},
            {"role": "assistant", "content": f"A {colour} {shape} on white."},
        ]
        found.append({"images": [picture], "messages": messages})
    return found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="HuggingFaceTB/SmolVLM-256M-Instruct")
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolVLM-500M-Instruct")
    parser.add_argument("--output_dir", default="smolvlm-shapes")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--num_train", type=int, default=800)
    parser.add_argument("--num_eval", type=int, default=32)
    parser.add_argument("--size", type=int, default=384, help="of a picture, in pixels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

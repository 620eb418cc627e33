"""A T5 student of a larger T5 on GSM8K, half on-policy: the setting of Agarwal et al. 2023.

    python examples/seq2seq.py --student google/flan-t5-small --teacher google/flan-t5-xl

The encoder reads the question. On half of the samples the decoder learns from GSM8K's solution, on the others from one
that the student samples. Seq2SeqTrainer generates answers to test problems before and after, and counts the correct
ones. `--data` also takes a folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from gkd_trainer import GKDArguments, GKDMixin
from gkd_trainer.data import gsm8k


@dataclass
class S2SConfig(GKDArguments, Seq2SeqTrainingArguments):
    """The options of both."""


class S2STrainer(GKDMixin, Seq2SeqTrainer):
    """Seq2SeqTrainer whose loss is the divergence from a teacher."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the divergence and the accuracy on test problems before and after."""
    args = parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.student)

    def accuracy(generated: EvalPrediction) -> dict[str, float]:
        solutions, answers = (
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (generated.predictions, generated.label_ids)
        )
        correct = [
            gsm8k.final_number(solution) == gsm8k.final_number(answer)
            for solution, answer in zip(solutions, answers, strict=True)
        ]
        return {"accuracy": float(np.mean(correct))}

    config = S2SConfig(
        output_dir=args.output_dir,
        lmbda=0.5,
        beta=0.5,
        max_new_tokens=args.max_new_tokens,
        max_length=512,
        predict_with_generate=True,
        generation_max_length=args.max_new_tokens,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = S2STrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=rows(args.data, "train"),
        eval_dataset=rows(args.data, "test", args.num_eval),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_accuracy"):
        print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")


def rows(source: str, split: str, limit: int | None = None) -> Any:
    """Return GSM8K as texts to read and to write."""

    def texts(row: Mapping[str, Any]) -> dict[str, str]:
        question, answer = row["messages"]
        return {"prompt": question["content"], "completion": answer["content"]}

    return gsm8k.load(source, split, "conversation", limit).map(texts, remove_columns="messages")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="google/flan-t5-small")
    parser.add_argument("--teacher", default="google/flan-t5-xl")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="t5-gsm8k")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=64)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

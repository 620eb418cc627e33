r"""A draft model for speculative decoding: a small model learns to draft what a large one would write.

    python examples/draft_model.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

The acceptance, and the tokens that each forward of the teacher gives while the student drafts for it, are printed
before and after. The served text keeps the teacher's distribution; only the speed changes. vLLM requires heads
of equal size, so the saved student's is padded, or cut, to the teacher's. To serve both:

    vllm serve Qwen/Qwen2.5-7B-Instruct --speculative-config '{"method": "draft_model", "model": "draft-gsm8k",
        "num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}'

Acceptance is one minus the total variation, so `--divergence total_variation` trains on it directly; its gradient is
small while the models hardly overlap, so start with another divergence. `--data` also takes a folder with
train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k
from gkd_trainer.report.drafting import tokens_per_forward


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print how often the teacher accepts a draft, before and after."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=args.lmbda,
        beta=0.0,
        divergence=args.divergence,
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
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
        eval_dataset=gsm8k.load(args.data, "test", "conversation", args.num_eval),
    )
    problems = gsm8k.load(args.data, "test", "prompt", args.num_assisted)
    prompts = [
        trainer.processing_class.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for row in problems
    ]

    def measured() -> dict[str, float]:
        rate = tokens_per_forward(
            trainer.teacher_model,
            trainer.model,
            prompts,
            drafts=args.drafts,
            max_new_tokens=args.max_new_tokens,
            seed=0,
        )
        return {"acceptance": trainer.evaluate()["eval_acceptance"], "tokens per forward of the teacher": rate}

    before = measured()
    trainer.train()
    after = measured()
    resize_head_like(trainer.teacher_model, trainer.model)
    trainer.save_model()
    for name, value in before.items():
        print(f"{name}: {value:.3f} before, {after[name]:.3f} after")


def resize_head_like(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Give the student's head the teacher's size: both are the tokenizer's, padded differently."""
    size = teacher.get_output_embeddings().weight.shape[0]
    if student.get_output_embeddings().weight.shape[0] != size:
        student.resize_token_embeddings(size)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="draft-gsm8k")
    parser.add_argument("--lmbda", type=float, default=0.5)
    parser.add_argument("--divergence", default="jsd", help="with beta=0, jsd is the forward KL")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=64)
    parser.add_argument("--num_assisted", type=int, default=8, help="prompts for which completions are generated")
    parser.add_argument("--drafts", type=int, default=4, help="tokens that the student drafts at once")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

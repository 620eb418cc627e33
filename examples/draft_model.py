r"""A draft model for speculative decoding: a small model learns to draft what a large one would write.

    python examples/draft_model.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

The acceptance on answers that the teacher samples, which is what will be served, and the tokens that each forward of
the teacher gives while the student drafts for it, are printed before and after. The served text keeps the teacher's
distribution; only the speed changes. vLLM requires heads of equal size, so the saved student's is padded, or cut, to
the teacher's. To serve both:

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
from datasets import Dataset
from transformers import PreTrainedModel

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k
from gkd_trainer.report.drafting import tokens_per_forward
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.rollouts.build import find_stop_ids
from gkd_trainer.types import Sampling


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print how often the teacher accepts a draft, before and after."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=args.lmbda,
        beta=0.0 if args.divergence == "jsd" else GKDConfig.beta,  # others have none
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
    )
    tokenizer = trainer.processing_class
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in gsm8k.load(args.data, "test", "prompt", max(args.num_eval, args.num_assisted))
    ]
    answers = teachers_answers(trainer, prompts[: args.num_eval], args.max_new_tokens)

    def measured() -> dict[str, float]:
        rate = tokens_per_forward(
            trainer.teacher_model,
            trainer.model,
            prompts[: args.num_assisted],
            drafts=args.drafts,
            max_new_tokens=args.max_new_tokens,
            seed=0,
        )
        return {"acceptance": trainer.evaluate(answers)["eval_acceptance"], "tokens per forward of the teacher": rate}

    before = measured()
    trainer.train()
    after = measured()
    resize_head_like(trainer.teacher_model, trainer.model)
    trainer.save_model()
    for name, value in before.items():
        print(f"{name}: {value:.3f} before, {after[name]:.3f} after")


def teachers_answers(trainer: GKDTrainer, prompts: Sequence[list[int]], max_new_tokens: int) -> Dataset:
    """Return rows of prompts with answers that the teacher samples: a student's acceptance differs between texts."""
    teacher, tokenizer = trainer.teacher_model, trainer.processing_class
    engine = HFRollouts(find_stop_ids(teacher, tokenizer), tokenizer.pad_token_id)
    engine.sync(teacher)
    completions = engine.generate(prompts, Sampling(max_new_tokens), seeds=range(len(prompts)))
    return Dataset.from_list(
        [
            {
                "input_ids": [*prompt, *completion.token_ids],
                "labels": [*[-100] * len(prompt), *completion.token_ids],
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )


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
    parser.add_argument("--num_eval", type=int, default=64, help="prompts that the teacher answers")
    parser.add_argument("--num_assisted", type=int, default=8, help="prompts that are drafted for")
    parser.add_argument("--drafts", type=int, default=4, help="tokens that the student drafts at once")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

"""A LoRA adapter as the student: half of the samples come from GSM8K's solutions, half from the student.

    python examples/lora_student.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

The student's own weights do not change; only the adapter, a few MB, is trained and saved. At the end it is loaded onto
a fresh student, which answers one question. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save an adapter, load it again, and print an answer."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=0.5,
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
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()

    model = AutoPeftModelForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    question = [{"role": "user", "content": "Tom has 3 boxes of 12 eggs. How many eggs does he have?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)[0]
    print("The student with its adapter:", tokenizer.decode(answer[inputs["input_ids"].shape[1] :]))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="lora-gsm8k")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

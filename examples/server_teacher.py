r"""A teacher behind an ordinary vLLM server: half of the samples come from GSM8K's solutions, half from the student.

Start the teacher, here or on another machine (see docs/vllm.md), then train:

    vllm serve Qwen/Qwen2.5-7B-Instruct --host 127.0.0.1 --port 8001 --max-model-len 1024 --max-logprobs 64
    python examples/server_teacher.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher_url http://127.0.0.1:8001

If both run here, put CUDA_VISIBLE_DEVICES=1 before the first command and CUDA_VISIBLE_DEVICES=0 before the second. On a
CPU, put VLLM_CPU_KVCACHE_SPACE=1 before the first: GiB for its KV cache, which otherwise takes nearly all memory.

The student is compared with the teacher's 64 most probable tokens and one bucket for all others. The probability that
each model gives to those tokens is printed at the end. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the served teacher, and print how much of both distributions its top tokens cover."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        teacher_server_base_url=args.teacher_url,
        teacher_top_k=args.teacher_top_k,
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
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
    )
    trainer.train()
    trainer.save_model()

    masses = [entry for entry in trainer.state.log_history if "teacher_top_k_mass" in entry]
    print(f"Probability of the teacher's top {args.teacher_top_k} tokens:")
    for entry in masses:
        teacher, student = entry["teacher_top_k_mass"], entry["student_top_k_mass"]
        print(f"  step {entry['step']}: teacher {teacher:.4f}, student {student:.4f}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument(
        "--teacher_url", default="http://127.0.0.1:8001", help="one URL, or several separated by commas"
    )
    parser.add_argument("--teacher_top_k", type=int, default=64, help="at most the server's --max-logprobs")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="server-teacher-gsm8k")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

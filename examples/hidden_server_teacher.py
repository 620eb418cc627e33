r"""The full distribution of a teacher behind an ordinary vLLM server: reverse KL on the student's own answers.

Start the teacher, here or on another machine, so that it returns hidden states; then train. Name its checkpoint
too: the head is read from there.

    vllm serve Qwen/Qwen2.5-7B-Instruct --host 127.0.0.1 --port 8001 --max-model-len 1024 \
        --runner pooling --convert embed --pooler-config '{"task": "token_embed"}'
    python examples/hidden_server_teacher.py --student Qwen/Qwen2.5-0.5B-Instruct \
        --teacher Qwen/Qwen2.5-7B-Instruct --teacher_url http://127.0.0.1:8001

If both run here, put CUDA_VISIBLE_DEVICES=1 before the first command and CUDA_VISIBLE_DEVICES=0 before the second. On a
CPU, put VLLM_CPU_KVCACHE_SPACE=1 before the first: GiB for its KV cache, which otherwise takes nearly all memory.

The logged divergences are printed at the end: over all tokens and at a temperature of 2, which a server of top tokens
can't give. `--data` also takes a folder with train.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from gkd_trainer import GKDConfig, GKDTrainer, HiddenStateServerTeacher
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the served teacher, and print what its server sent and the logged divergences."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        teacher_server_base_url=args.teacher_url,
        teacher_server_signal="hidden_states",
        teacher_model_name_or_path=args.teacher,
        lmbda=1.0,
        beta=1.0,
        loss_temperature=2.0,
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

    teacher = trainer.teacher
    assert isinstance(teacher, HiddenStateServerTeacher)
    print(f"The server sent {teacher.dtype} hidden states for {teacher.vocab_size} tokens. Divergence:")
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"  step {entry['step']}: {entry['loss']:.4f}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct", help="the checkpoint that is served")
    parser.add_argument(
        "--teacher_url", default="http://127.0.0.1:8001", help="one URL, or several separated by commas"
    )
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="hidden-server-teacher-gsm8k")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

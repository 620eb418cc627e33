r"""On-policy distillation on GSM8K: the student solves problems, and the teacher scores every token it wrote.

    python examples/on_policy_gsm8k.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

Only the questions are read (lmbda=1), and beta=1 is the reverse KL, which keeps the student to what the teacher finds
likely. Completions are printed during training; at the end the student solves a few test problems greedily.
`--data` also takes a folder with train.jsonl and test.jsonl.

`--vllm colocate` generates with vLLM in this process. `--vllm server --vllm_server_base_url http://127.0.0.1:8000`
generates with a server, which gets the weights of every step. Start the server first, with the student (see
docs/vllm.md):

    CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-0.5B-Instruct --host 127.0.0.1 --port 8000 \
        --max-model-len 512

and this script with CUDA_VISIBLE_DEVICES=0. On a CPU, VLLM_CPU_KVCACHE_SPACE=1 before the command bounds the server's
KV cache, in GiB, which otherwise takes nearly all memory, and `--hf-overrides '{"tie_word_embeddings": false}'` behind
it unties the head of a student with tied embeddings, such as this one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k


def main(argv: Sequence[str] | None = None) -> None:
    """Train on only the questions, and print the accuracy on test problems."""
    args = parse_args(argv)
    config = GKDConfig(
        output_dir=args.output_dir,
        lmbda=1.0,
        beta=1.0,
        max_new_tokens=args.max_new_tokens,
        max_length=256 + args.max_new_tokens,
        use_vllm=args.vllm is not None,
        vllm_mode=args.vllm or "colocate",
        vllm_server_base_url=args.vllm_server_base_url,
        # Compiling takes long on a CPU.
        vllm_engine_kwargs={"enforce_eager": not torch.cuda.is_available()} if args.vllm == "colocate" else None,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        log_completions=True,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "prompt", instruction=gsm8k.INSTRUCTION),
    )
    trainer.train()
    trainer.save_model()

    problems = gsm8k.load(args.data, "test", "prompt", limit=args.num_eval, instruction=gsm8k.INSTRUCTION)
    tokenizer = trainer.processing_class
    prompts = [
        tokenizer.apply_chat_template(problem["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for problem in problems
    ]
    trainer.rollouts.sync(trainer.model)  # the current weights, after the last step
    greedy = trainer.rollouts.greedy_sampling(args.max_new_tokens)
    completions = trainer.rollouts.generate(prompts, greedy, seeds=range(len(prompts)))
    solutions = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    correct = sum(map(gsm8k.is_correct, solutions, problems["ground_truth"]))
    print(f"Solved {correct} of {len(problems)} test problems")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="on-policy-gsm8k")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=32)
    parser.add_argument("--vllm", choices=["colocate", "server"], help="by default, transformers generates")
    parser.add_argument("--vllm_server_base_url", help="where the student's server listens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

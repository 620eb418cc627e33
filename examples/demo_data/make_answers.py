"""Generate a teacher's answers to a file of prompts, as a dataset to distil from.

Usage:

    python examples/demo_data/make_answers.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct

Reads rows ``{"prompt": str}`` and writes rows ``{"prompt": str, "completion": str, "model": str}`` in the
same order. Answers that do not end their turn within ``--max-new-tokens`` are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer import HFRollouts

HERE = Path(__file__).parent


def main() -> None:
    """Read the prompts, generate answers, write the finished ones and print how many there are."""
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=getattr(torch, args.dtype))
    teacher = teacher.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    if args.limit is not None:
        prompts = prompts[: args.limit]
    completions = answer(
        teacher,
        tokenizer,
        prompts,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )

    finished = [(p, c) for p, c in zip(prompts, completions, strict=True) if c is not None]
    with args.output.open("w") as file:
        for prompt, completion in finished:
            row = {"prompt": prompt, "completion": completion, "model": args.model_name}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    lengths = [len(tokenizer(c, add_special_tokens=False).input_ids) for _, c in finished]
    print(
        f"{len(finished)} of {len(prompts)} answers finished within {args.max_new_tokens} tokens, "
        f"{sum(lengths) / max(len(lengths), 1):.1f} tokens on average -> {args.output}"
    )


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="a local folder or a hub name")
    parser.add_argument("--model-name", default="SmolLM2-135M-Instruct", help="written into every row")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--output", type=Path, default=HERE / "teacher_answers.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--limit", type=int, help="only the first LIMIT prompts")
    return parser.parse_args()


def answer(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str | None]:
    """Answer each prompt greedily, in the order given; None for an answer that was cut off."""
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]
    engine = HFRollouts(stop_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.eos_token_id)
    engine.sync(teacher)
    completions: list[str | None] = [None] * len(prompts)
    # Prompts of similar length share a batch, so that there is little padding.
    by_length = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    with tqdm(total=len(prompts), unit="answer") as progress:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            sampling = engine.greedy_sampling(max_new_tokens)
            for row, completion in zip(
                rows, engine.generate([encoded[row] for row in rows], sampling, [0] * len(rows)), strict=True
            ):
                if completion.is_finished:
                    completions[row] = tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
            progress.update(len(rows))
    return completions


if __name__ == "__main__":
    main()

r"""Compare ways to distil on GSM8K by the test problems solved: arms as in docs/evidence.md on a real pair, for a GPU.

    python examples/gsm8k_experiment.py --student Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct

The teacher and the student that all arms start from are examined first. Every arm trains for the same number of steps,
and adds a line of JSON to OUTPUT_DIR/results.jsonl. Arms that are already there with the same options are left out, so
the same command continues after an interruption.
`fresh-*` learns from new samples by the teacher in every step: without it, nothing can be said about on-policy.
`--data` also takes a folder with train.jsonl and test.jsonl. `--vllm` generates the student's samples with vLLM in this
process; the teacher's are by transformers, as are all answers to test problems. So with it, seconds of `own-*` and
`fresh-*` do not compare. Those of `sft` include the teacher's forward, which plain SFT does without.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, set_seed

from gkd_trainer import GKDConfig, GKDTrainer
from gkd_trainer.data import gsm8k
from gkd_trainer.rollouts import HFRollouts
from gkd_trainer.rollouts.build import find_stop_ids

UNTRAINED = ("teacher", "start")
"""In place of an arm: the teacher, and the student before training."""

ARMS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"lmbda": 0.0, "ce_weight": 1.0},
    **{f"fixed-{beta:g}": {"lmbda": 0.0, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    **{f"fresh-{beta:g}": {"lmbda": 0.0, "seq_kd": True, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    **{f"own-{beta:g}": {"lmbda": 1.0, "beta": beta} for beta in (0.0, 0.5, 1.0)},
    "mixed-0.5": {"lmbda": 0.5, "beta": 0.5},
    "rising-0.5": {"lmbda": 0.0, "lmbda_end": 1.0, "lmbda_schedule": "linear", "beta": 0.5},
}
"""Options of GKDConfig by the name of an arm; the number is β."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    args = parse_args(argv)
    results = Path(args.output_dir) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", "arms", "seeds")}
    runs = [*((arm, 0) for arm in UNTRAINED), *((arm, seed) for seed in range(args.seeds) for arm in args.arms)]
    for arm, seed in runs:
        if not any((line["arm"], line["seed"]) == (arm, seed) for line in lines_of(results, options)):
            line = {"arm": arm, "seed": seed, "options": options, **measured(args, arm, seed)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print_tables(lines_of(results, options))


def measured(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train a student unless the arm is untrained, and examine it.

    Return which test problems it has solved, the length of its answers and the share that was cut, its agreement and
    acceptance on the solutions of the data, and the seconds of training. The divergence is not among them: each arm
    evaluates its own.
    """
    set_seed(seed)
    options = ARMS.get(arm, {"lmbda": 0.0})
    generates = options["lmbda"] > 0 or "lmbda_end" in options
    config = GKDConfig(
        output_dir=str(Path(args.output_dir) / "run"),
        max_new_tokens=args.max_new_tokens,
        max_length=512 + args.max_new_tokens,
        use_vllm=args.vllm and generates,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        **options,
    )
    trainer = GKDTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=config,
        train_dataset=gsm8k.load(args.data, "train", "conversation"),
        eval_dataset=gsm8k.load(args.data, "test", "conversation", args.num_eval),
    )
    seconds = 0.0
    try:
        if arm in ARMS:
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
        evaluation = trainer.evaluate()
    finally:
        trainer.rollouts.close()  # a vLLM engine would keep its memory, and break that of the next arm
    model = trainer.teacher_model if arm == "teacher" else trainer.model
    return {
        **examined(args, model, trainer.processing_class),
        "agreement": 1.0 if arm == "teacher" else evaluation["eval_top_token_agreement"],
        "acceptance": 1.0 if arm == "teacher" else evaluation["eval_acceptance"],
        "seconds": seconds,
    }


def examined(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Return which test problems a model solves greedily, and its answers' mean length and share cut at the limit."""
    problems = gsm8k.load(args.data, "test", "prompt", args.num_eval)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in problems
    ]
    # The same engine for all arms, whichever generated in training.
    engine = HFRollouts(find_stop_ids(model, tokenizer), tokenizer.pad_token_id, batch_size=64)
    engine.sync(model)
    answers = engine.generate(prompts, engine.greedy_sampling(args.max_new_tokens), seeds=range(len(prompts)))
    texts = [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
    return {
        "solved": [*map(gsm8k.is_correct, texts, problems["ground_truth"])],
        "length": sum(len(answer.token_ids) for answer in answers) / len(answers),
        "cut": sum(not answer.is_finished for answer in answers) / len(answers),
    }


def lines_of(results: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results so far with these options; a line cut short by a kill is left out."""
    found = []
    for text in results.read_text().splitlines() if results.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line.get("options") == options:
            found.append(line)
    return found


def print_tables(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print the means over seeds by arm, and how on-policy arms differ from those with the same β."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {arm: {} for arm in (*UNTRAINED, *ARMS)}
    for line in lines:
        by_arm[line["arm"]][line["seed"]] = line
    console, names = Console(), ("length", "cut", "agreement", "acceptance", "seconds")
    table = Table("arm", "seeds", "accuracy", *names)
    for arm, by_seed in by_arm.items():
        if by_seed:
            means = [np.mean([line[name] for line in by_seed.values()]) for name in names]
            accuracy = np.mean([line["solved"] for line in by_seed.values()])
            table.add_row(arm, str(len(by_seed)), f"{accuracy:.3f}", *(f"{mean:.3f}" for mean in means))
    console.print(table)

    table = Table("difference in accuracy", "seeds", "mean", "95 % interval")
    for kind, beta in ((kind, beta) for kind in ("fixed", "fresh") for beta in ("0", "0.5", "1")):
        arm, control = by_arm[f"own-{beta}"], by_arm[f"{kind}-{beta}"]
        seeds = sorted(arm.keys() & control.keys())
        if seeds:
            differences_SP = np.array(
                [np.subtract(arm[seed]["solved"], control[seed]["solved"], dtype=float) for seed in seeds]
            )
            low, high = interval(differences_SP)
            table.add_row(
                f"own-{beta} − {kind}-{beta}",
                str(len(seeds)),
                f"{differences_SP.mean():+.3f}",
                f"{low:+.3f} to {high:+.3f}",
            )
    if table.row_count:
        console.print(table)


def interval(differences_SP: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Return a 95 % interval of the mean of differences by seed (S) and problem (P): at each end the wider of two.

    One resamples both (bootstrap), the other is Student's t over the means of the seeds: from a few seeds alone, the
    first is too narrow. With one seed it says nothing about others.
    """
    numbers = np.random.default_rng(0)
    counts_RS, counts_RP = (
        numbers.multinomial(size, np.full(size, 1 / size), size=resamples) for size in differences_SP.shape
    )
    means_R = ((counts_RS @ differences_SP) * counts_RP).sum(axis=1) / differences_SP.size
    low, high = np.percentile(means_R, [2.5, 97.5])
    n_seeds = len(differences_SP)
    if n_seeds > 1:
        means_S = differences_SP.mean(axis=1)
        reach = students_t(n_seeds - 1) * means_S.std(ddof=1) / np.sqrt(n_seeds)
        low, high = min(low, means_S.mean() - reach), max(high, means_S.mean() + reach)
    return float(low), float(high)


def students_t(freedom: int) -> float:
    """Return the t that a value of Student's distribution exceeds in size with a probability of 5 %.

    With t = √freedom · tan(θ) its density is proportional to cos(θ)^(freedom - 1), which is summed here.
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    middles = (angles[1:] + angles[:-1]) / 2
    shares = np.cumsum(np.cos(middles) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95, shares / shares[-1], angles[1:])))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--output_dir", default="gsm8k-experiment")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--num_eval", type=int, default=256)
    parser.add_argument("--vllm", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

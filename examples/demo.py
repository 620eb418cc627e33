"""Distil a small real model on this machine, and see what it gained.

    make demo

The teacher is SmolLM2-135M-Instruct, the student its first 10 and last 5 layers of 30. It learns first from the
teacher's answers to prompts (off-policy, forward KL), then from those and its own completions in equal shares (λ = 0.5,
JSD). What is printed at the end was measured in this run, on prompts that were not trained on.

On a GPU, or with a hub at hand, larger models take the same way:

    make demo ARGS="--teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct"
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from demo_data.make_answers import answer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer
from gkd_trainer.batch import IGNORE_INDEX, Sampling
from gkd_trainer.report.completions import CompletionRow, print_completions
from gkd_trainer.report.stages import plot_stages, print_stages

HERE = Path(__file__).parent
TEXT_KL, SAMPLES_KL = "forward KL, teacher's text", "reverse KL, student's samples"
AGREEMENT = "same top token, teacher's text"


class StopAfter(TrainerCallback):
    """Ends a phase when its time is up, so that a slow machine gets a shorter demo and not a longer one."""

    def __init__(self, seconds: float) -> None:
        """Start counting when training does."""
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Note when the phase began."""
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop when its time has passed."""
        control.should_training_stop |= time.monotonic() - self.began > self.seconds


def main() -> None:
    """Train in two phases, measure three times, and report."""
    options = parse_options()
    began = time.monotonic()
    console = Console()
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto" if on_gpu else torch.float32)
    teacher.to("cuda" if on_gpu else "cpu")
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in answers(options, teacher, tokenizer)]
    rows = [{key: [message(key, row[key])] for key in row} for row in rows]
    train_rows, held_out = rows[: -options.held_out], rows[-options.held_out :]
    console.print(f"{len(train_rows)} answers of the teacher to learn from, {len(held_out)} to measure on.")

    def trainer(name: str, steps: int, seconds: float, **settings) -> GKDTrainer:
        return GKDTrainer(
            model=student,
            teacher=FrozenTeacher(teacher, tokenizer=tokenizer),
            args=GKDConfig(
                output_dir=str(options.output / name),
                max_steps=steps,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=8,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                max_length=192,
                max_new_tokens=options.max_new_tokens,
                logging_steps=4,
                save_strategy="no",
                report_to=[],
                bf16=on_gpu and torch.cuda.is_bf16_supported(),
                dataloader_pin_memory=on_gpu,
                **settings,
            ),
            train_dataset=Dataset.from_list(train_rows),
            eval_dataset=Dataset.from_list(held_out),
            processing_class=tokenizer,
            callbacks=[StopAfter(seconds)],
        )

    off_policy = trainer("off_policy", options.off_policy_steps, 60 * 3.5, lmbda=0.0, beta=0.0, learning_rate=5e-4)
    stages, samples = {}, {}
    stages["before"], samples["before"] = measure(off_policy)
    off_policy.train()
    stages["off-policy"], samples["off-policy"] = measure(off_policy)
    mixed = trainer("mixed", options.mixed_steps, 60 * 2, lmbda=0.5, beta=0.5, learning_rate=2e-4)
    mixed.train()
    stages["λ = 0.5"], samples["λ = 0.5"] = measure(mixed)

    for index in range(options.shown):
        prompt = held_out[index]["prompt"][0]["content"]
        print_completions(
            [
                CompletionRow("teacher (greedy)", prompt, held_out[index]["completion"][0]["content"], True),
                *(CompletionRow(f"student, {stage}", prompt, *rows[index]) for stage, rows in samples.items()),
            ],
            console=console,
        )
    print_stages(stages, f"On {len(held_out)} held-out prompts; KL in nats a token", console)
    histories = {"off-policy (forward KL)": off_policy, "λ = 0.5 (JSD)": mixed}
    picture = options.output / "demo.png"
    plot_stages(stages, {name: run.state.log_history for name, run in histories.items()}, picture)
    (options.output / "demo.json").write_text(json.dumps(stages, indent=2))
    mixed.save_model(str(options.output / "student"))
    minutes = (time.monotonic() - began) / 60
    console.print(f"{minutes:.1f} minutes. The picture is {picture}, the student {options.output / 'student'}.")


def measure(trainer: GKDTrainer) -> tuple[dict[str, float], list[tuple[str, bool]]]:
    """Measure the student on the teacher's text, and on completions that it samples now; return those too."""
    beta = trainer.args.beta
    trainer.args.beta = 0.0
    on_text = trainer.evaluate()

    prompts = [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE_INDEX]
        for row in trainer.eval_dataset
    ]
    trainer.rollouts.sync(trainer.model)
    completions = trainer.rollouts.generate(prompts, Sampling(trainer.args.max_new_tokens), list(range(len(prompts))))
    sampled = [
        {
            "input_ids": [*prompt, *completion.token_ids],
            "labels": [*[IGNORE_INDEX] * len(prompt), *completion.token_ids],
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    trainer.args.beta = 1.0
    on_samples = trainer.evaluate(Dataset.from_list(sampled))
    trainer.args.beta = beta
    texts = [
        (trainer.processing_class.decode(item.token_ids, skip_special_tokens=True), item.is_finished)
        for item in completions
    ]
    measures = {
        TEXT_KL: on_text["eval_loss"],
        SAMPLES_KL: on_samples["eval_loss"],
        AGREEMENT: on_text["eval_top_token_agreement"],
    }
    return measures, texts


def answers(options: argparse.Namespace, teacher, tokenizer) -> list[dict[str, str]]:
    """Return the teacher's answers: those kept for the default teacher, or fresh ones of another."""
    if options.teacher == str(options.pair / "teacher"):
        return read_rows(HERE / "demo_data" / "teacher_answers.jsonl")
    prompts = [row["prompt"] for row in read_rows(HERE / "demo_data" / "prompts.jsonl")]
    completions = answer(teacher, tokenizer, prompts, batch_size=32, max_new_tokens=96)
    pairs = zip(prompts, completions, strict=True)
    return [{"prompt": prompt, "completion": text} for prompt, text in pairs if text is not None]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def message(key: str, text: str) -> dict[str, str]:
    """Return a text as a message of a conversation."""
    return {"role": "user" if key == "prompt" else "assistant", "content": text}


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=Path(".cache/smollm2"), help="folder of the default models")
    parser.add_argument("--teacher", help="another teacher: a hub name or a folder")
    parser.add_argument("--student", help="another student, with the teacher's tokenizer")
    parser.add_argument("--off-policy-steps", type=int, default=60)
    parser.add_argument("--mixed-steps", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24, help="how many answers are kept to measure on")
    parser.add_argument("--shown", type=int, default=3, help="how many prompts the table of completions shows")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    options.teacher = options.teacher or str(options.pair / "teacher")
    options.student = options.student or str(options.pair / "student")
    return options


if __name__ == "__main__":
    main()

"""Distil a small real model on this machine, and see what it gains.

    make demo

The teacher is SmolLM2-135M-Instruct; the student is its first 10 and last 5 layers of 30. The student first learns from
the teacher's answers to prompts (off-policy, forward KL). From there it continues twice, for the same number of steps:
once on its own completions and the teacher's answers in equal shares (λ = 0.5), and once on the answers alone (λ = 0),
with everything else the same. The difference between the two shows what its own completions contribute. All results
printed at the end were measured in this run, on prompts that were not trained on.

On a GPU, or with access to a hub, larger models work the same way:

    make demo ARGS="--teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct"
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from demo_data.make_answers import answer
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer
from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.report.stages import plot_curves, print_samples, print_stages
from gkd_trainer.types import Sampling

HERE = Path(__file__).parent
TEXT_KL, SAMPLES_KL = "forward KL, teacher's text", "reverse KL, own samples"
AGREEMENT = "agreement, teacher's text"


class Examiner:
    """Measures a student, even during training, on prompts that it is not trained on."""

    def __init__(self, build_trainer, held_out: list) -> None:
        """Take a function that builds a trainer from options, and the rows to measure on."""
        self.on_text, self.on_samples = (
            build_trainer("examiner", beta=beta, eval_dataset=Dataset.from_list(held_out), disable_tqdm=True)
            for beta in (0.0, 1.0)
        )
        for trainer in (self.on_text, self.on_samples):
            trainer.remove_callback(PrinterCallback)
        # The rows as the trainer prepared them: token ids, with labels on the answer.
        self.prompts = [
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE_INDEX]
            for row in self.on_text.eval_dataset
        ]

    def measure(self) -> tuple[dict[str, float], list[tuple[str, bool]]]:
        """Compare with the teacher on its text and on fresh completions by the student; return the completions too."""
        began = time.monotonic()
        on_text = self.on_text.evaluate()
        trainer = self.on_samples
        trainer.rollouts.sync(trainer.model)
        sampling = Sampling(trainer.args.max_new_tokens)
        completions = trainer.rollouts.generate(self.prompts, sampling, list(range(len(self.prompts))))
        sampled = [
            {
                "input_ids": [*prompt, *completion.token_ids],
                "labels": [*[IGNORE_INDEX] * len(prompt), *completion.token_ids],
            }
            for prompt, completion in zip(self.prompts, completions, strict=True)
        ]
        on_samples = trainer.evaluate(Dataset.from_list(sampled))
        measures = {
            TEXT_KL: on_text["eval_loss"],
            SAMPLES_KL: on_samples["eval_loss"],
            AGREEMENT: on_text["eval_top_token_agreement"],
        }
        decode = trainer.processing_class.decode
        texts = [(decode(item.token_ids, skip_special_tokens=True), item.is_finished) for item in completions]
        self.seconds = time.monotonic() - began
        return measures, texts


class Measure(TrainerCallback):
    """Measures during a run, and ends it when its time is up, so that a slow machine gets a shorter demo.

    `curve` holds the measurements by step, beginning with the step at which the run starts; `texts` the last
    completions.
    """

    def __init__(self, examiner: Examiner, every: int, seconds: float, start: tuple[int, dict[str, float]]) -> None:
        """Start from a point; measure after every `every` steps and after the last."""
        self.examiner, self.every, self.seconds = examiner, every, seconds
        self.curve = [start]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Record when the run began."""
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop when the time is up, and measure when it is due."""
        # The last measurement is still to come, and will take as long as the previous one.
        control.should_training_stop |= time.monotonic() - self.began + self.examiner.seconds > self.seconds
        if state.global_step % self.every == 0 or control.should_training_stop:
            measures, self.texts = self.examiner.measure()
            self.curve.append((self.curve[0][0] + state.global_step, measures))


def main() -> None:
    """Train off-policy, continue from there with λ = 0.5 and with λ = 0, and report the measurements."""
    options = parse_options()
    datasets.disable_progress_bars()
    began = time.monotonic()
    console = Console()
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto" if on_gpu else torch.float32)
    teacher.to("cuda" if on_gpu else "cpu")
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    rows = [
        {key: [message(key, row[key])] for key in ("prompt", "completion")}
        for row in answers(options, teacher, tokenizer)
    ]
    train_rows, held_out = rows[: -options.held_out], rows[-options.held_out :]
    console.print(f"{len(train_rows)} answers of the teacher to learn from, {len(held_out)} to measure on.")

    def trainer(name: str, **settings) -> GKDTrainer:
        return build_trainer(options.output / name, options.max_new_tokens, student, teacher, tokenizer, **settings)

    examiner = Examiner(trainer, held_out)
    stages, samples, curves, minutes = {}, {}, {}, {}
    stages["before"], samples["before"] = examiner.measure()

    def run(stage: str, steps: int, start: tuple[int, dict[str, float]], times: int, limit: float, **settings) -> None:
        console.print(f"{stage}: {steps} steps")
        measure = Measure(examiner, -(-steps // times), 60 * limit, start)
        train_dataset = Dataset.from_list(train_rows)
        run_began = time.monotonic()
        trainer("run", train_dataset=train_dataset, callbacks=[measure], max_steps=steps, **settings).train()
        minutes[stage] = (time.monotonic() - run_began) / 60
        curves[stage], stages[stage], samples[stage] = measure.curve, measure.curve[-1][1], measure.texts

    start = (0, stages["before"])
    run("off-policy", options.off_policy_steps, start, times=3, limit=3.5, lmbda=0.0, beta=0.0, learning_rate=5e-4)
    start, weights = curves["off-policy"][-1], copy.deepcopy(student.state_dict())
    further = {"beta": 0.5, "learning_rate": 2e-4}
    run("then λ = 0.5", options.further_steps, start, times=2, limit=2.5, lmbda=0.5, **further)
    student.save_pretrained(options.output / "student")
    tokenizer.save_pretrained(options.output / "student")
    student.load_state_dict(weights)
    # As many steps as the other run made, which may have been stopped early; these take less time.
    steps = curves["then λ = 0.5"][-1][0] - start[0]
    run("then λ = 0", steps, start, times=2, limit=math.inf, lmbda=0.0, **further)

    print_comparison(options, held_out, samples, console)
    times = ", ".join(f"{stage} {time:.1f}" for stage, time in minutes.items())
    caption = (
        f"The last two columns both continue from the second for {steps} steps, with the same rows, divergence (JSD) "
        "and learning rate. They differ only in λ: compare them with each other to see what training on its own "
        "completions does for the student. This is one run with one seed: small differences may be chance. "
        f"Minutes of training, including measurements: {times}."
    )
    print_stages(stages, f"On {len(held_out)} held-out prompts; KL in nats per token", caption, console)
    picture = options.output / "demo.png"
    plot_curves(curves, picture, logarithmic={TEXT_KL, SAMPLES_KL})
    (options.output / "demo.json").write_text(json.dumps({"stages": stages, "curves": curves}, indent=2))
    total = (time.monotonic() - began) / 60
    console.print(f"{total:.1f} minutes. The plot is {picture}, the student (λ = 0.5) {options.output / 'student'}.")


def build_trainer(
    output_dir: Path,
    max_new_tokens: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings,
) -> GKDTrainer:
    """Return a trainer of the student with the settings that all runs share, and those given."""
    return GKDTrainer(
        model=student,
        teacher=FrozenTeacher(teacher, tokenizer=tokenizer),
        args=GKDConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            max_length=192,
            max_new_tokens=max_new_tokens,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            **settings,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def print_comparison(
    options: argparse.Namespace, held_out: list, samples: dict[str, list[tuple[str, bool]]], console: Console
) -> None:
    """Print the first held-out prompts, each with the completions by the teacher and the student at every stage."""
    for index in range(options.shown):
        teacher_sample = {"teacher (greedy)": (held_out[index]["completion"][0]["content"], True)}
        student_samples = {f"student, {stage}": texts[index] for stage, texts in samples.items()}
        print_samples(held_out[index]["prompt"][0]["content"], teacher_sample | student_samples, console)
    console.rule()


def answers(options: argparse.Namespace, teacher, tokenizer) -> list[dict[str, str]]:
    """Return the teacher's answers: the stored ones of the default teacher, or fresh ones of another."""
    if options.teacher == str(options.pair / "teacher"):
        return read_rows(HERE / "demo_data" / "teacher_answers.jsonl")
    prompts = [row["prompt"] for row in read_rows(HERE / "demo_data" / "prompts.jsonl")]
    completions = answer(teacher, tokenizer, prompts, batch_size=32, max_new_tokens=96)
    pairs = zip(prompts, completions, strict=True)
    return [{"prompt": prompt, "completion": text} for prompt, text in pairs if text is not None]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file."""
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
    parser.add_argument("--off-policy-steps", type=int, default=54)
    parser.add_argument("--further-steps", type=int, default=24, help="in each of the two runs that follow")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24, help="number of answers to keep for measuring")
    parser.add_argument("--shown", type=int, default=3, help="number of prompts to show with their completions")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    options.teacher = options.teacher or str(options.pair / "teacher")
    options.student = options.student or str(options.pair / "student")
    return options


if __name__ == "__main__":
    main()

"""Draft models: a pruned SmolLM2 drafts for SmolLM2-135M-Instruct, which accepts or rejects each token.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with a student as the draft model accepts a token with
probability Σ min(p, q); DistillSpec (Zhou et al. 2023, arXiv 2310.08461) distils for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experiments.arms import ARMS, DECISIVE, is_timed
from experiments.measures import Remembering, compared, completions
from experiments.studies import Grid, Run, Study, make_start
from experiments.training import Setting
from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.report.drafting import tokens_per_forward

DATA = Path(__file__).parents[1] / "examples" / "demo_data" / "teacher_answers.jsonl"
HELD_OUT = 24
ASSISTED = 4
DRAFTS = (4, 8)
MAX_NEW_TOKENS = 48
STEPS = 24
STARTING = 5
"""How many times as long a student learns before all arms begin."""

_OPTIONS = {
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "use_cpu": True,
}


class DraftStudy(Study):
    """Students that all start from the pruned model after some steps of forward KL on the data.

    Args:
        folder: Where the starting points are kept.
        pair: The folder of the two models (`make demo` makes it).
    """

    name: ClassVar[str] = "drafts"
    decisive: ClassVar[tuple[str, ...]] = ("acceptance",)
    measures: ClassVar[Mapping[str, str]] = {
        "acceptance": "acceptance, teacher's samples",
        "forward_kl": "KL(teacher‖student), teacher's samples",
        "own_reverse_kl": "KL(student‖teacher), own samples",
        "own_student_entropy": "entropy, own samples",
        "sampled_4": "tokens per forward, sampling, 4 drafts",
        "sampled_8": "the same, 8 drafts",
        "greedy_4": "greedy, 4 drafts",
        "greedy_8": "greedy, 8 drafts",
    }

    def __init__(self, folder: Path, pair: Path) -> None:
        self._folder, self._pair = folder, pair
        self._at_start: dict[int, dict[str, Any]] = {}

    def runs(self, grid: Grid) -> list[Run]:
        """Return a few arms with one seed, or all with three."""
        if grid == "small":
            return [Run(arm, 0, STEPS // 3, {}) for arm in DECISIVE]
        runs = [Run(arm, seed, STEPS, {}) for seed in range(3) for arm in ARMS]
        return sorted(runs, key=lambda run: is_timed(run.arm))

    def setting(self, run: Run) -> Setting:
        """Return the setting of all runs."""
        pruned = Setting(
            student=lambda seed: self._model("student"),
            teacher=self._teacher,
            pad_token_id=self._tokenizer.pad_token_id,
            rows={"data": self._rows, "teacher": self._teachers_rows},
            measure=self._examination,
            measure_at_end=self._examination.in_full if run.seed == 0 else self._examination.of_own_samples,
            options={**_OPTIONS, "learning_rate": 5e-4},
            own_options={"max_new_tokens": MAX_NEW_TOKENS, "max_length": 192},
            measured_at=(0.5,),
            at_start=self._at_start,
        )
        return pruned.starting_from(
            lambda seed: self._start(pruned, seed, STARTING * run.steps), options={**_OPTIONS, "learning_rate": 2e-4}
        )

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._pair / "teacher")

    @cached_property
    def _teacher(self) -> PreTrainedModel:
        return self._model("teacher")

    @cached_property
    def _examination(self) -> _Examination:
        return _Examination(self._teacher, self._held_out_prompts, self._tokenizer.pad_token_id)

    @cached_property
    def _answers(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in DATA.read_text().splitlines()]

    @property
    def _held_out_prompts(self) -> list[list[int]]:
        return [self._prompt(answer) for answer in self._answers[-HELD_OUT:]]

    def _model(self, name: str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._pair / name, dtype=torch.float32).eval()
        return model

    def _prompt(self, answer: Mapping[str, str]) -> list[int]:
        message = {"role": "user", "content": answer["prompt"]}
        text = self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _rows(self, seed: int) -> list[dict[str, Any]]:
        found = []
        for answer in self._answers[:-HELD_OUT]:
            ids = self._tokenizer(answer["completion"], add_special_tokens=False)["input_ids"]
            # An answer that is cut has no end.
            completion = [*ids, self._tokenizer.eos_token_id][:MAX_NEW_TOKENS]
            found.append(_row(self._prompt(answer), completion))
        return found

    def _teachers_rows(self, seed: int) -> list[dict[str, Any]]:
        prompts = [self._prompt(answer) for answer in self._answers[:-HELD_OUT]]
        sampled = completions(
            self._teacher,
            prompts,
            self._tokenizer.pad_token_id,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            batch_size=16,
        )
        return [_row(prompt, completion) for prompt, completion in zip(prompts, sampled, strict=True)]

    def _start(self, pruned: Setting, seed: int, steps: int) -> PreTrainedModel:
        folder = self._folder / f"start-{seed}-{steps}"
        make_start(folder, pruned, "fixed-forward", seed, steps)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model


class _Examination:
    """Measures a student as a draft model, on prompts that no student learns on."""

    def __init__(self, teacher: PreTrainedModel, prompts: Sequence[list[int]], pad_token_id: int) -> None:
        self._teacher, self._prompts, self._pad_token_id = teacher, prompts, pad_token_id
        self._teachers_rows = self._sampled(teacher, seed=0)
        self._remembering_teacher = Remembering(teacher)

    def __call__(self, student: PreTrainedModel) -> dict[str, Any]:
        """Return the measures on the teacher's samples, and the acceptance by prompt."""
        by_prompt = [
            compared(student, self._remembering_teacher, [row], self._pad_token_id) for row in self._teachers_rows
        ]
        lengths = [len(row["input_ids"]) - row["labels"].count(IGNORE_INDEX) for row in self._teachers_rows]
        return {
            **{
                name: sum(length * each[name] for length, each in zip(lengths, by_prompt, strict=True)) / sum(lengths)
                for name in by_prompt[0]
            },
            # Scaled by length, so that their mean is that of all tokens.
            "by_prompt": {
                "acceptance": [
                    each["acceptance"] * length * len(lengths) / sum(lengths)
                    for each, length in zip(by_prompt, lengths, strict=True)
                ]
            },
        }

    def of_own_samples(self, student: PreTrainedModel) -> dict[str, Any]:
        """Return the measures on samples of the student."""
        on_own = compared(student, self._teacher, self._sampled(student, seed=1), self._pad_token_id, batch_size=8)
        return {f"own_{name}": value for name, value in on_own.items()}

    def in_full(self, student: PreTrainedModel) -> dict[str, Any]:
        """Return these and, what takes longest, the tokens per forward of the teacher.

        They are given by how the teacher chooses tokens and how many the student drafts.
        """
        drafting = {
            f"{name}_{drafts}": tokens_per_forward(
                self._teacher,
                student,
                self._prompts[:ASSISTED],
                drafts=drafts,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=seed,
            )
            for name, seed in (("sampled", 0), ("greedy", None))
            for drafts in DRAFTS
        }
        return {**self.of_own_samples(student), **drafting}

    def _sampled(self, model: PreTrainedModel, seed: int) -> list[dict[str, Any]]:
        sampled = completions(
            model, self._prompts, self._pad_token_id, max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=16
        )
        return [_row(prompt, completion) for prompt, completion in zip(self._prompts, sampled, strict=True)]


def _row(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": [*prompt, *completion], "labels": [*[IGNORE_INDEX] * len(prompt), *completion]}

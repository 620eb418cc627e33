"""Errands: small models from scratch, a teacher that knows the way from anywhere, students that have seen little."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments import errands
from experiments.arms import ARMS, DECISIVE, FEW, TEACHER, is_timed
from experiments.errands import MAX_NEW_TOKENS, PAD
from experiments.measures import compared, completions
from experiments.studies import Grid, Run, Study, made_once, make_start
from experiments.training import Setting

HELD_OUT = 256
TEACHER_STEPS = 1200
START_STEPS = 1000
STEPS = 500
SMALL_STEPS = 200
MAIN = {"width": 32, "demonstrations": 1000}
_OPTIONS = {"per_device_train_batch_size": 64, "lr_scheduler_type": "constant_with_warmup", "use_cpu": True}


class ErrandStudy(Study):
    """Students of three widths and three numbers of demonstrations; each starts from SFT on its demonstrations.

    Args:
        folder: Where the teacher and the starting points are kept.
    """

    name: ClassVar[str] = "errands"
    decisive: ClassVar[tuple[str, ...]] = ("success", "recovery")
    measures: ClassVar[Mapping[str, str]] = {
        "success": "success",
        "recovery": "recovery",
        "exact_match": "exact match",
        "forward_kl": "KL(teacher‖student), teacher's walks",
        "own_reverse_kl": "KL(student‖teacher), own walks",
        "own_student_entropy": "entropy, own walks",
    }

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def kinds(self) -> Mapping[str, Sequence[str]]:
        """What the wrong step does that a student must recover from."""
        return {"recovery": [errands.effect_of_wrong_step(errand, beginning) for errand, beginning in _begun()]}

    def runs(self, grid: Grid) -> list[Run]:
        """Return all arms in the main setting, and a few of them in the others."""
        if grid == "small":
            runs = [Run(arm, seed, SMALL_STEPS, MAIN) for seed in range(2) for arm in FEW]
            return [Run(TEACHER, 0, SMALL_STEPS, MAIN), *runs]
        main = [Run(TEACHER, 0, STEPS, MAIN), *(Run(arm, seed, STEPS, MAIN) for seed in range(5) for arm in ARMS)]
        others = [
            Run(arm, seed, STEPS, {"width": width, "demonstrations": count})
            for width, count in ((32, 250), (32, 4000), (24, 1000), (64, 1000))
            for seed in range(5)
            for arm in DECISIVE
        ]
        return [*sorted(main, key=lambda run: is_timed(run.arm)), *others]

    def setting(self, run: Run) -> Setting:
        """Return the setting of a run's width and number of demonstrations."""
        width, count = run.factors["width"], run.factors["demonstrations"]
        teacher = self._teacher()

        def rows(seed: int) -> list[dict[str, Any]]:
            return [errands.row_of(errand, errand.demonstration()) for errand in errands.errands(count, seed)]

        def teachers_rows(seed: int) -> list[dict[str, Any]]:
            asked = errands.errands(count, seed)
            walks = completions(
                teacher, [errand.prompt for errand in asked], PAD, max_new_tokens=MAX_NEW_TOKENS, seed=seed
            )
            return [errands.row_of(errand, walk) for errand, walk in zip(asked, walks, strict=True)]

        examination = _Examination(teacher)
        untrained = Setting(
            student=lambda seed: errands.model(width, 2, seed),
            teacher=teacher,
            pad_token_id=PAD,
            rows={"data": rows, "teacher": teachers_rows},
            measure=examination,
            options={**_OPTIONS, "learning_rate": 3e-3, "warmup_steps": 50},
            own_options={"max_new_tokens": MAX_NEW_TOKENS, "max_length": 2 * MAX_NEW_TOKENS},
        )
        return untrained.starting_from(
            lambda seed: self._start(untrained, f"start-{width}-{count}-{seed}", seed),
            options={**_OPTIONS, "learning_rate": 5e-4, "warmup_steps": 10},
        )

    def _teacher(self) -> PreTrainedModel:
        folder = self._folder / "teacher"
        plan = {"steps": TEACHER_STEPS, "seed": 0}
        with made_once(folder, plan) as is_missing:
            if is_missing:
                errands.trained_teacher(**plan).save_pretrained(folder)
        return _loaded(folder)

    def _start(self, untrained: Setting, name: str, seed: int) -> PreTrainedModel:
        folder = self._folder / name
        make_start(folder, untrained, "sft", seed, START_STEPS)
        return copy.deepcopy(_loaded(folder))


def _begun() -> list[tuple[errands.Errand, list[int]]]:
    """Return the errands that no student learns on, each with a beginning that ends in a wrong step."""
    numbers = random.Random(0)
    return [(errand, errands.corrupted(errand, numbers)) for errand in errands.errands(HELD_OUT, "held out")]


class _Examination:
    """Measures a student on errands that no student learns on."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        self._teacher = teacher
        self._errands, self._corrupted = zip(*_begun(), strict=True)
        self._teachers_rows = self._rows(teacher, seed=0)

    def __call__(self, student: PreTrainedModel) -> dict[str, Any]:
        """Return the measures, and the decisive ones by errand."""
        walks = self._walks(student, [errand.prompt for errand in self._errands])
        successes = [errand.is_done_by(walk) for errand, walk in zip(self._errands, walks, strict=True)]
        begun = list(zip(self._errands, self._corrupted, strict=True))
        ends = self._walks(student, [errand.prompt + beginning for errand, beginning in begun])
        recoveries = [errand.is_done_by(beginning + end) for (errand, beginning), end in zip(begun, ends, strict=True)]
        matches = [errand.demonstration() == walk for errand, walk in zip(self._errands, walks, strict=True)]
        on_teachers = compared(student, self._teacher, self._teachers_rows, PAD, batch_size=128)
        on_own = compared(student, self._teacher, self._rows(student, seed=1), PAD, batch_size=128)
        return {
            "success": _share(successes),
            "recovery": _share(recoveries),
            "exact_match": _share(matches),
            **on_teachers,
            **{f"own_{name}": value for name, value in on_own.items()},
            "by_prompt": {"success": [*map(float, successes)], "recovery": [*map(float, recoveries)]},
        }

    def _walks(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], seed: int | None = None) -> Any:
        return completions(model, prompts, PAD, max_new_tokens=MAX_NEW_TOKENS, seed=seed)

    def _rows(self, model: PreTrainedModel, seed: int) -> list[dict[str, Any]]:
        walks = self._walks(model, [errand.prompt for errand in self._errands], seed)
        return [errands.row_of(errand, walk) for errand, walk in zip(self._errands, walks, strict=True)]


@cache
def _loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)

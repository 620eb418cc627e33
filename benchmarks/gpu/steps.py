"""The stage `steps`: whole training steps of a 0.5B student, with its loss from hidden states or from plain logits.

A step here is rollout, teacher, student and optimizer in a plain loop, so that it needs no trainer and none of the
packages that ours needs. Where these are installed, GKDTrainer takes the same steps. The student has float32 weights
under bfloat16 autocast, the teachers are in bfloat16.

Shapes: B batch, L length, N tokens trained on, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.clocks import measured_memory, seconds_of
from benchmarks.gpu.cells import Cell, NotMeasuredError, Where
from benchmarks.gpu.models import random_model, random_rows, tokenizer, vocabulary_size
from benchmarks.loss import BETA, plain_divergence
from benchmarks.pair import common_arguments
from benchmarks.step import LORA, SPLIT, take_turn, timed
from gkd_trainer.divergence import token_divergence
from gkd_trainer.models.heads import compare, find_head, predict
from gkd_trainer.models.loading import base_model
from gkd_trainer.report.metrics import Stopwatch
from gkd_trainer.signals import StudentSignal
from gkd_trainer.types import TokenBatch

STUDENT = "0.5B"
TEACHERS = ("1.5B", "7B")
POLICIES = ("off", "on")
TUNED = ("full", "LoRA")
CONTENDERS = ("ours", "logits", "trainer")
TRAINER_NEEDS = ("trl", "datasets", "pyarrow", "pandas", "xxhash", "dill", "multiprocess", "pydantic", "tenacity")

_SECONDS = {"off": 15.0, "on": 25.0}


@dataclass(frozen=True)
class Sizes:
    """B samples of L tokens, the last `new` of which are generated on-policy, and all but `prompt` trained on."""

    B: int
    L: int
    prompt: int
    new: int
    steps: int

    @classmethod
    def of(cls, where: Where, policy: str) -> Sizes:
        """Return the sizes of a policy: rollouts take most of an on-policy step, so its completions are shorter."""
        if where.is_small:
            return cls(B=2, L=12, prompt=8 if policy == "on" else 3, new=4, steps=1)
        if policy == "on":
            return cls(B=8, L=1024, prompt=896, new=128, steps=2)
        return cls(B=8, L=1024, prompt=256, new=0, steps=4)


def cells(where: Where) -> list[Cell]:
    """Return the cells of the stage, the shorter ones first."""
    return [
        Cell(
            "step",
            measure_step,
            _SECONDS[policy],
            {"teacher": teacher, "policy": policy, "tuned": tuned, "contender": contender},
        )
        for policy in POLICIES
        for contender in CONTENDERS
        for teacher in where.pick(TEACHERS, TEACHERS[1:])
        for tuned in where.pick(TUNED, TUNED[:1] if policy == "off" else TUNED[1:])
    ]


def measure_step(where: Where, teacher: str, policy: str, tuned: str, contender: str) -> dict[str, Any]:
    """Return seconds per step, in all and by part, and the bytes in use before and at the peak."""
    if contender == "trainer":
        _require_packages()
    sizes = Sizes.of(where, policy)
    student = random_model(where, STUDENT, torch.float32).train()
    teacher_model = _teacher(where, teacher)
    adapter = LoraConfig(**LORA) if tuned == "LoRA" else None
    if contender == "trainer":
        return _of_trainer(where, sizes, policy, student, teacher_model, adapter)
    if adapter is not None:
        student = get_peft_model(student, adapter)
    loop = Loop(where, sizes, policy, student, teacher_model, losses()[contender])
    loop.step()
    loop.clock.read()
    seconds = []
    with measured_memory(where.torch_device) as memory:
        for _ in range(sizes.steps):
            seconds.append(seconds_of(loop.step, where.torch_device))
    split = {name: total / sizes.steps for name, total in loop.clock.read().items()}
    mean = statistics.mean(seconds)  # the parts are sums over the steps
    return {
        "seconds": mean,
        **{name: split.get(name, 0.0) for name in SPLIT},
        "rest": mean - sum(split.values()),
        "bytes_before": memory.before,
        "peak_bytes": memory.peak,
        "tokens_trained": loop.tokens_trained,
    }


class Loop:
    """A plain training loop on one batch.

    Args:
        where: The device, and whether sizes are tiny.
        sizes: Those of the batch.
        policy: "off", or "on" to generate the end of each sample.
        student: The student, perhaps with adapters.
        teacher: The teacher.
        loss: Returns the sum of the divergences over the tokens of a batch.
    """

    def __init__(
        self,
        where: Where,
        sizes: Sizes,
        policy: str,
        student: nn.Module,
        teacher: nn.Module,
        loss: Callable[[Models, TokenBatch, Stopwatch], Tensor],
    ) -> None:
        self._where, self._sizes, self._is_on_policy, self._loss = where, sizes, policy == "on", loss
        self.models = Models.of(student, teacher, where)
        self._rows = random_rows(where, sizes.B, sizes.L, sizes.prompt)
        self._trained = [weight for weight in student.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-6, fused=where.device == "cuda")
        self.clock = Stopwatch(where.torch_device)
        self.tokens_trained = 0

    def step(self) -> None:
        """Take one optimizer step."""
        inputs = self._rows
        if self._is_on_policy:
            with self.clock.measure("rollout"):
                inputs = self._generated()
        batch = TokenBatch.from_inputs(inputs)
        self.tokens_trained = batch.n_scored
        loss = self._loss(self.models, batch, self.clock) / batch.n_scored
        with self.clock.measure("student"):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _generated(self) -> dict[str, Tensor]:
        student, sizes = self.models.student, self._sizes
        student.eval()
        with autocast(self._where):
            ids_BL = student.generate(
                input_ids=self._rows["input_ids"][:, : sizes.prompt],
                attention_mask=self._rows["attention_mask"][:, : sizes.prompt],
                do_sample=True,
                min_new_tokens=sizes.new,
                max_new_tokens=sizes.new,
            )
        student.train()
        labels_BL = ids_BL.clone()
        labels_BL[:, : sizes.prompt] = -100
        return {"input_ids": ids_BL, "labels": labels_BL, "attention_mask": torch.ones_like(ids_BL)}


@dataclass(frozen=True)
class Models:
    """A student, perhaps with adapters, and a teacher, with their heads."""

    student: Any
    teacher: Any
    student_head: Any
    teacher_head: Any
    vocab_size: int
    where: Where

    @classmethod
    def of(cls, student: nn.Module, teacher: nn.Module, where: Where) -> Models:
        """Find the heads. The vocabulary is that of the tokenizer, without what pads the heads."""
        return cls(student, teacher, find_head(base_model(student)), find_head(teacher), vocabulary_size(where), where)


def losses() -> dict[str, Callable[[Models, TokenBatch, Stopwatch], Tensor]]:
    """Return the ways to compute the loss."""
    return {"ours": _from_hidden_states, "logits": _from_logits}


def _from_hidden_states(models: Models, batch: TokenBatch, clock: Stopwatch) -> Tensor:
    with clock.measure("teacher"), torch.no_grad():
        signal, _ = predict(models.teacher, batch, models.teacher_head, use_cache=False)
    teacher = signal.sliced(models.vocab_size)

    def values_N(student: StudentSignal) -> Tensor:
        # As in the trainer: rounded on CUDA only.
        product_dtype = torch.bfloat16 if models.where.device == "cuda" else None
        sliced = student.sliced(models.vocab_size)
        return token_divergence(sliced, teacher, beta=BETA, product_dtype=product_dtype).values_N

    with clock.measure("student"), autocast(models.where):
        divergence_N, _ = compare(models.student, batch, models.student_head, values_N)
        return divergence_N.sum()


def _from_logits(models: Models, batch: TokenBatch, clock: Stopwatch) -> Tensor:
    def logits_NV(model: Any) -> Tensor:
        logits_BLV: Tensor = model(**batch.model_inputs, use_cache=False).logits
        return logits_BLV[batch.rows_N, batch.columns_N, : models.vocab_size]

    with clock.measure("teacher"), torch.no_grad():
        teacher_logits_NV = logits_NV(models.teacher)
    with clock.measure("student"), autocast(models.where):
        return plain_divergence(logits_NV(models.student), teacher_logits_NV)


def autocast(where: Where) -> torch.autocast:
    """Return autocast to bfloat16."""
    return torch.autocast(where.device, torch.bfloat16)


def _require_packages() -> None:
    missing = [name for name in TRAINER_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise NotMeasuredError(f"not installed: {', '.join(missing)}")


def _of_trainer(
    where: Where, sizes: Sizes, policy: str, student: nn.Module, teacher: nn.Module, peft_config: Any
) -> dict[str, Any]:
    from datasets import Dataset

    from gkd_trainer import FrozenTeacher, GKDConfig, GKDTrainer

    is_on_cuda = where.device == "cuda"
    batch = random_rows(where, sizes.B, sizes.L, sizes.prompt)
    rows = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    args = GKDConfig(
        **common_arguments(is_on_cuda=is_on_cuda),
        lmbda=float(policy == "on"),
        beta=BETA,
        bf16=True,
        max_steps=sizes.steps,
        max_length=sizes.L,
        max_new_tokens=max(sizes.new, 1),
        per_device_train_batch_size=sizes.B,
    )
    trainer = GKDTrainer(
        student,
        args,
        train_dataset=Dataset.from_list(rows * sizes.steps),
        processing_class=(words := tokenizer(where)),
        teacher=FrozenTeacher(teacher, words),
        peft_config=peft_config,
    )
    stopwatch = timed(trainer)
    take_turn(trainer, stopwatch, sizes.steps)  # compiles
    turn = take_turn(trainer, stopwatch, sizes.steps)
    return {
        "seconds": turn.seconds,
        **turn.split,
        "rest": turn.seconds - sum(turn.split.values()),
        "bytes_before": turn.bytes_before,
        "peak_bytes": turn.peak_bytes,
        "tokens_trained": round(turn.trained_tokens),
    }


@functools.lru_cache(maxsize=1)
def _teacher(where: Where, size: str) -> nn.Module:
    return random_model(where, size, torch.bfloat16).eval().requires_grad_(False)

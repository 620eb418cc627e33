"""What a student has become, beside its teacher: divergences, acceptance and entropy on given and on own samples.

Shapes: B batch, L length, N completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence import token_divergence
from gkd_trainer.signals import LogitsSignal

Rows = Sequence[Mapping[str, Any]]


def padded(rows: Rows, pad_token_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows of `input_ids` and `labels` as model inputs and labels [B, L], padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def tensor(name: str, value: int) -> Tensor:
        return torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows])

    ids_BL, labels_BL = tensor("input_ids", pad_token_id), tensor("labels", IGNORE_INDEX)
    mask_BL = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids_BL, "attention_mask": mask_BL}, labels_BL


class Remembering:
    """A model that keeps its outputs, for inputs that it gets again and again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._outputs: dict[tuple[int, ...], Any] = {}

    def __call__(self, **inputs: Tensor) -> Any:
        """Return the model's output for a batch without padding."""
        assert bool(inputs["attention_mask"].all())
        key = (*inputs["input_ids"].shape, *inputs["input_ids"].flatten().tolist())
        if key not in self._outputs:
            self._outputs[key] = self._model(**inputs)
        return self._outputs[key]


@torch.no_grad()
def compared(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Remembering,
    rows: Rows,
    pad_token_id: int,
    batch_size: int = 16,
) -> dict[str, float]:
    """Return the means over the completions' tokens of both KLs, the acceptance, the agreement and both entropies.

    `forward_kl` is KL(teacher‖student) and `reverse_kl` KL(student‖teacher), in nats; `acceptance` is Σ min(p, q).
    """
    names = ("forward_kl", "reverse_kl", "acceptance", "agreement", "student_entropy", "teacher_entropy")
    sums = dict.fromkeys(names, 0.0)
    count = 0
    for start in range(0, len(rows), batch_size):
        inputs, labels_BL = padded(rows[start : start + batch_size], pad_token_id)
        is_scored_BL = labels_BL[:, 1:] != IGNORE_INDEX
        student_NV, teacher_NV = (model(**inputs).logits[:, :-1][is_scored_BL] for model in (student, teacher))
        forward, reverse = (
            token_divergence(LogitsSignal(student_NV), LogitsSignal(teacher_NV), beta=beta) for beta in (0.0, 1.0)
        )
        sums["forward_kl"] += float(forward.values_N.double().sum())
        sums["reverse_kl"] += float(reverse.values_N.double().sum())
        sums["acceptance"] += float(forward.acceptance_N.double().sum())
        sums["agreement"] += float(forward.agrees_N.double().sum())
        sums["student_entropy"] += float(forward.student_entropy_N.double().sum())
        sums["teacher_entropy"] += float(forward.teacher_entropy_N.double().sum())
        count += len(student_NV)
    return {name: total / max(1, count) for name, total in sums.items()}


@torch.no_grad()
def completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    max_new_tokens: int,
    seed: int | None = None,
    batch_size: int = 128,
) -> list[list[int]]:
    """Complete prompts, greedily or, with a seed, by sampling at temperature 1 from the whole distribution."""
    stop_ids = model.generation_config.eos_token_id
    stop_ids = {stop_ids} if isinstance(stop_ids, int) else {*(stop_ids or ())}
    if seed is not None:
        torch.manual_seed(seed)
    found: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        length = max(map(len, batch))
        ids_BL = torch.tensor([[*[pad_token_id] * (length - len(prompt)), *prompt] for prompt in batch])
        mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output_BL = model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            max_new_tokens=max_new_tokens,
            do_sample=seed is not None,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad_token_id,
        )
        for ids in output_BL[:, length:].tolist():
            end = next((index + 1 for index, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
            found.append(ids[:end])
    return found

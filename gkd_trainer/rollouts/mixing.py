"""Which samples of an optimizer step are on-policy, and how their completions enter the batches.

All draws come from a counter-based generator keyed by (seed, optimizer step, position in the global batch): every
rank agrees, a resumed run draws what the unbroken one would have drawn, and the global RNG is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gkd_trainer.batch import IGNORE_INDEX, IS_ON_POLICY, PROMPT_IDS, Generated, prompt_length

_CHOICE, _SAMPLING = 0, 1


def lmbda_at(step: int, max_steps: int, lmbda: float, lmbda_end: float | None, schedule: str) -> float:
    """Return λ at an optimizer step (from 0): constant, or linear from `lmbda` to `lmbda_end` at the last step."""
    if schedule == "constant" or lmbda_end is None:
        return lmbda
    return lmbda + (lmbda_end - lmbda) * min(1.0, step / max(1, max_steps - 1))


def is_on_policy(lmbda: float, granularity: str, seed: int, step: int, position: int) -> bool:
    """Return whether the sample at `position` of the step's global batch is on-policy: u < λ with u in [0, 1).

    With granularity "batch" the whole step shares one draw (Agarwal et al. 2023, algorithm 1).
    """
    generator = _generator(seed, _CHOICE, step, position if granularity == "sample" else 0)
    return bool(generator.random() < lmbda)


def sampling_seed(seed: int, step: int, position: int) -> int:
    """Return the seed of the completion at `position` of the step's global batch, in [0, 2⁶³)."""
    return int(_generator(seed, _SAMPLING, step, position).integers(2**63))


def rows_of(inputs: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids and labels of each sample of a collated batch, without its padding."""
    ids_BL, labels_BL = inputs["input_ids"], inputs["labels"]
    mask_BL = inputs.get("attention_mask")
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    return [
        (
            [token_id for token_id, is_real in zip(ids, mask, strict=True) if is_real],
            [label for label, is_real in zip(labels, mask, strict=True) if is_real],
        )
        for ids, labels, mask in zip(ids_BL.tolist(), labels_BL.tolist(), mask_BL.tolist(), strict=True)
    ]


def prompts_of(inputs: Mapping[str, Any]) -> list[list[int]]:
    """Return the prompt of each sample: its own (see PROMPT_IDS), or all before its last trained run, or none."""
    before_last_run = [ids[: prompt_length(labels)] for ids, labels in rows_of(inputs)]
    own_BP = inputs.get(PROMPT_IDS)
    if own_BP is None:
        return before_last_run
    own = [[token_id for token_id in ids if token_id != IGNORE_INDEX] for ids in own_BP.tolist()]
    return [given or found for given, found in zip(own, before_last_run, strict=True)]


def with_completions(
    inputs: Mapping[str, Any],
    generated: Mapping[int, Generated],
    pad_token_id: int,
) -> dict[str, Any]:
    """Return a batch in which some rows hold what was generated: a prompt, and a completion, the only part trained on.

    Padded on the right; says under IS_ON_POLICY which rows the student generated. Other tensors of shape [B, L] do not
    fit the new lengths and are left out.
    """
    ids_BL: Tensor = inputs["input_ids"]
    marked = dict(inputs)
    is_on_policy = [row in generated and generated[row].is_on_policy for row in range(ids_BL.shape[0])]
    marked[IS_ON_POLICY] = torch.tensor(is_on_policy, device=ids_BL.device)
    if not generated:
        return marked
    ids_rows, labels_rows = [], []
    for row, (ids, labels) in enumerate(rows_of(inputs)):
        if row in generated:
            prompt, completion = list(generated[row].prompt), list(generated[row].completion.token_ids)
            ids, labels = prompt + completion, [IGNORE_INDEX] * len(prompt) + completion
        ids_rows.append(torch.tensor(ids, dtype=torch.long))
        labels_rows.append(torch.tensor(labels, dtype=torch.long))

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value).to(ids_BL.device)

    if PROMPT_IDS in marked:  # what was generated has its prompt before it now
        own_BP = marked[PROMPT_IDS].clone()
        own_BP[list(generated)] = IGNORE_INDEX
        marked[PROMPT_IDS] = own_BP
    kept = {
        key: value
        for key, value in marked.items()
        if key == PROMPT_IDS or not (isinstance(value, Tensor) and value.shape[:2] == ids_BL.shape[:2])
    }
    return {
        **kept,
        "input_ids": padded(ids_rows, pad_token_id),
        "attention_mask": padded([torch.ones_like(ids) for ids in ids_rows], 0),
        "labels": padded(labels_rows, IGNORE_INDEX),
    }


def _generator(seed: int, stream: int, step: int, position: int) -> np.random.Generator:
    # The low words of the counter are left to the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, step]))

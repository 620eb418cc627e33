"""Which samples of an optimizer step are on-policy, and how their completions enter the batches.

Shapes: B batch, L length, P length of a sample's own prompt.

All draws come from a counter-based generator keyed by (seed, optimizer step, position in the global batch): all ranks
agree, a resumed run draws the same as an uninterrupted one, and the global RNG is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gkd_trainer.batch_keys import (
    DECODER_INPUT_IDS,
    IGNORE_INDEX,
    IS_ON_POLICY,
    PER_LABEL,
    PROMPT_IDS,
    SAMPLING_LOG_PROBS,
    SIDE_TENSORS,
    has_decoder_inputs,
    may_be_per_token,
)
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import Completion, Generated, prompt_length

_CHOICE, _SAMPLING = 0, 1

# Per token, added by TRL's DataCollatorForChatML; nothing here reads it.
_LEFT_OUT = frozenset({"byte_offsets"})

# The boundaries of samples that are joined in one row.
_JOINING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


def lmbda_at(step: int, max_steps: int, lmbda: float, lmbda_end: float | None, schedule: str) -> float:
    """Return λ at an optimizer step (from 0): constant, or linear from `lmbda` to `lmbda_end` at the last step."""
    if schedule == "constant" or lmbda_end is None:
        return lmbda
    return lmbda + (lmbda_end - lmbda) * min(1.0, step / max(1, max_steps - 1))


def is_on_policy(lmbda: float, granularity: str, seed: int, step: int, position: int) -> bool:
    """Return whether the sample at `position` of the step's global batch is on-policy: u < λ with u in [0, 1).

    With granularity "batch", all samples of the step share one draw (Agarwal et al. 2023, algorithm 1).
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
    """Return the prompt of each sample: its own (see PROMPT_IDS), else all tokens before its last trained run.

    For an encoder-decoder, that is all that its encoder reads.
    """
    if has_decoder_inputs(inputs):
        ids_BL, mask_BL = inputs["input_ids"], inputs.get("attention_mask")
        is_real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
        return [ids_L[is_real_L].tolist() for ids_L, is_real_L in zip(ids_BL.cpu(), is_real_BL.cpu(), strict=True)]
    before_last_run = [ids[: prompt_length(labels)] for ids, labels in rows_of(inputs)]
    own_BP = inputs.get(PROMPT_IDS)
    if own_BP is None:
        return before_last_run
    own = [[token_id for token_id in ids if token_id != IGNORE_INDEX] for ids in own_BP.tolist()]
    return [given or found for given, found in zip(own, before_last_run, strict=True)]


def require_extendable(inputs: Mapping[str, Any]) -> None:
    """Raise GKDDataError if a batch holds values that may be per token but that no rule extends by a completion.

    Only names and numbers of dimensions matter, so a collator's first batch decides for all. A completion changes
    nothing that an encoder reads.
    """
    if has_decoder_inputs(inputs):
        _require_replaceable(inputs)
        return
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if name in _JOINING:
            raise _not_extendable(name, value, "marks samples that are joined in one row")
        if not isinstance(value, Tensor):
            continue
        if name in _EXTENDED:
            if value.shape != shape:
                raise _not_extendable(name, value, f"does not have one value per token of input_ids {list(shape)}")
        elif may_be_per_token(name, value):
            raise _not_extendable(name, value, "may have one value per token, with no known rule to extend it")


def _require_replaceable(inputs: Mapping[str, Any]) -> None:
    shape = inputs["labels"].shape
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not (name in PER_LABEL or name.startswith("decoder_")):
            continue
        if name not in PER_LABEL:
            raise _not_extendable(name, value, "belongs to the decoder's tokens, with no known rule to extend it")
        if value.shape != shape:
            raise _not_extendable(name, value, f"does not have one value per label {list(shape)}")


def with_completions(
    inputs: Mapping[str, Any],
    generated: Mapping[int, Generated],
    pad_token_id: int,
) -> dict[str, Any]:
    """Return a batch in which some samples are replaced by a prompt and its generated completion.

    Only the completion is trained on, or the part that its `is_trained` marks. The batch is padded on the right, and
    its IS_ON_POLICY marks the samples that the student generated. Generated samples get values per token by the rule
    of each name; other samples keep theirs. Values per sample or image are kept, except SIDE_TENSORS that a completed
    sample loses. For an encoder-decoder, the completion replaces the labels and the decoder's inputs. The batch gets
    SAMPLING_LOG_PROBS if any of the student's completions has them.

    Raises:
        GKDDataError: the batch holds values that can't be extended.

    """
    ids_BL: Tensor = inputs["input_ids"]
    marked = {name: _side_completed(name, value, list(generated)) for name, value in inputs.items()}
    is_on_policy_B = marked.get(IS_ON_POLICY)
    if is_on_policy_B is None:
        is_on_policy_B = torch.zeros(len(ids_BL), dtype=torch.bool, device=ids_BL.device)
    by_student = torch.tensor([row for row, item in generated.items() if item.is_on_policy], dtype=torch.long)
    marked[IS_ON_POLICY] = is_on_policy_B.index_fill(0, by_student.to(ids_BL.device), True)
    if not generated:
        return marked
    require_extendable(inputs)
    marked.pop(SAMPLING_LOG_PROBS, None)  # of other completions, in other columns
    if has_decoder_inputs(inputs):
        completed = {**marked, **_replaced(inputs, generated, pad_token_id)}
    else:
        completed = _extended(marked, generated, pad_token_id)
    log_probs_BL = _log_probs(completed["labels"], generated, starts_after_prompt=not has_decoder_inputs(inputs))
    return completed if log_probs_BL is None else {**completed, SAMPLING_LOG_PROBS: log_probs_BL}


def _extended(inputs: Mapping[str, Any], generated: Mapping[int, Generated], pad_token_id: int) -> dict[str, Any]:
    """Return a batch in which some samples are their prompts with completions; values per token follow _EXTENDED."""
    ids_BL: Tensor = inputs["input_ids"]
    mask_BL = inputs.get("attention_mask")
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    extended_inputs = {name: value for name, value in inputs.items() if name not in _LEFT_OUT}
    extended_inputs["attention_mask"] = mask_BL
    is_real_BL = mask_BL.bool().cpu()
    samples = {row: _Sample.of(ids_BL[row].cpu()[is_real_BL[row]], item) for row, item in generated.items()}
    padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    for name, extended in _EXTENDED.items():
        if not isinstance(values_BL := extended_inputs.get(name), Tensor):
            continue
        rows = [
            extended(values_L[is_real_L], samples[row]).to(values_L.dtype)
            if row in samples
            else values_L[_between_padding(is_real_L)]
            for row, (values_L, is_real_L) in enumerate(zip(values_BL.cpu(), is_real_BL, strict=True))
        ]
        padded_BL = pad_sequence(rows, batch_first=True, padding_value=padding.get(name, 0))
        extended_inputs[name] = padded_BL.to(values_BL.device)
    return extended_inputs


def _log_probs(labels_BL: Tensor, generated: Mapping[int, Generated], *, starts_after_prompt: bool) -> Tensor | None:
    """Return the SAMPLING_LOG_PROBS of a completed batch; None if none of the student's completions has any."""
    found = {
        row: item
        for row, item in generated.items()
        if item.is_on_policy and item.completion.log_probs is not None and len(item.completion.token_ids)
    }
    if not found:
        return None
    values_BL = torch.full(labels_BL.shape, math.nan)
    for row, item in found.items():
        start, length = len(item.prompt) if starts_after_prompt else 0, len(item.completion.token_ids)
        values_BL[row, start : start + length] = torch.tensor(item.completion.log_probs)
    return values_BL.to(labels_BL.device)


def _replaced(inputs: Mapping[str, Any], generated: Mapping[int, Generated], pad_token_id: int) -> dict[str, Tensor]:
    """Return the values per label of an encoder-decoder's batch, in which some samples get completions."""
    padding = {"labels": IGNORE_INDEX, DECODER_INPUT_IDS: pad_token_id, "decoder_attention_mask": 0}
    rows: dict[str, list[Tensor]] = {name: [] for name in padding if inputs.get(name) is not None}
    for row, start_id in enumerate(inputs[DECODER_INPUT_IDS][:, 0].tolist()):
        kept = {name: inputs[name][row].cpu() for name in rows}
        values = _decoded(start_id, generated[row].completion) if row in generated else kept
        for name, values_of_rows in rows.items():
            values_of_rows.append(values[name].to(inputs[name].dtype))
    return {
        name: pad_sequence(values, batch_first=True, padding_value=padding[name]).to(inputs[name].device)
        for name, values in rows.items()
    }


def _decoded(start_id: int, completion: Completion) -> dict[str, Tensor]:
    """Return what a decoder reads, which of it is no padding, and the labels, for a completion."""
    ids, is_trained = torch.tensor(list(completion.token_ids), dtype=torch.long), completion.is_trained
    labels = ids if is_trained is None else ids.masked_fill(~torch.tensor(list(is_trained)).bool(), IGNORE_INDEX)
    read = torch.cat([torch.tensor([start_id]), ids])
    if len(ids):
        read = read[:-1]
    else:  # a forward needs one position
        labels = torch.tensor([IGNORE_INDEX])
    return {"labels": labels, DECODER_INPUT_IDS: read, "decoder_attention_mask": torch.ones_like(read)}


def _side_completed(name: str, value: Any, completed: list[int]) -> Any:
    """Return a batch's value that is not per token, after the samples `completed` got completions."""
    side = SIDE_TENSORS.get(name)
    if side is None or side.survives_completion or not completed:
        return value
    value = value.clone()
    value[completed] = side.filling
    return value


@dataclass(frozen=True)
class _Sample:
    """A prompt, its completion, which tokens of that are trained on, and the tokens of the row that they replace."""

    row_ids: Tensor
    prompt: Tensor
    completion: Tensor
    is_trained: Tensor

    @classmethod
    def of(cls, row_ids: Tensor, generated: Generated) -> _Sample:
        """Build the sample generated for a row with the tokens `row_ids`."""
        prompt, completion = (
            torch.tensor(list(ids), dtype=torch.long) for ids in (generated.prompt, generated.completion.token_ids)
        )
        given = generated.completion.is_trained
        is_trained = torch.ones_like(completion) if given is None else torch.tensor(list(given))
        return cls(row_ids, prompt, completion, is_trained.bool())

    @property
    def is_prompt_of_row(self) -> bool:
        """Whether the row begins with the prompt."""
        return torch.equal(self.row_ids[: len(self.prompt)], self.prompt)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    def labels(self) -> Tensor:
        """Return the ids of the tokens trained on, with IGNORE_INDEX for all others."""
        trained = self.completion.masked_fill(~self.is_trained, IGNORE_INDEX)
        return torch.cat([torch.full_like(self.prompt, IGNORE_INDEX), trained])

    def training_mask(self) -> Tensor:
        """Return 1 for each token that is trained on, and 0 for all others."""
        return torch.cat([torch.zeros_like(self.prompt), self.is_trained.long()])


def _restarted(positions: Tensor, sample: _Sample) -> Tensor:
    if len(positions) and not torch.equal(positions, positions[0] + torch.arange(len(positions))):
        raise GKDDataError(
            "position_ids of a sample to be completed must count up by one, so that a completion can continue them; "
            f"got {_shown(positions)}: give each sample its own row, or make the data collator return no position_ids "
            "(the model makes them)"
        )
    return torch.arange(len(sample))


def _token_types(types: Tensor, sample: _Sample) -> Tensor:
    # The type of the row's last token: that of an answer if it has one, else that of the text at the prompt's end.
    last = int(types[-1]) if len(types) else 0
    return torch.cat([_of_prompt("token_type_ids", types, sample), torch.full_like(sample.completion, last)])


def _modalities(types: Tensor, sample: _Sample) -> Tensor:
    of_other = _of_equal_tokens(types, sample)
    if not sample.is_prompt_of_row and of_other is not None:
        return torch.cat([of_other, torch.zeros_like(sample.completion)])
    of_prompt = _of_prompt("mm_token_type_ids", types, sample)
    if types[len(of_prompt) :].any():
        raise GKDDataError(
            "mm_token_type_ids mark an image or a video after the prompt, among the tokens that a completion replaces, "
            "so its pixels would be left over: put it before the last assistant turn"
        )
    return torch.cat([of_prompt, torch.zeros_like(sample.completion)])  # text


def _of_equal_tokens(types: Tensor, sample: _Sample) -> Tensor | None:
    """Return the types of a prompt's tokens from those of equal tokens in the row; None if it holds other images."""
    pairs = set(zip(sample.row_ids.tolist(), types.tolist(), strict=True))
    type_of = dict(pairs)
    of_prompt = torch.tensor([type_of.get(token_id, 0) for token_id in sample.prompt.tolist()], dtype=types.dtype)
    is_known = len(type_of) == len(pairs) and torch.equal(of_prompt[of_prompt != 0], types[types != 0])
    return of_prompt if is_known else None


def _of_prompt(name: str, values: Tensor, sample: _Sample) -> Tensor:
    if sample.is_prompt_of_row:
        return values[: len(sample.prompt)]
    if len(values) and bool((values == values[0]).all()):
        return values[:1].expand(len(sample.prompt))
    raise GKDDataError(
        f"{name} of a sample to be completed belong to other tokens than its prompt's; got {_shown(values)}: make the "
        f"data collator return no {name} or no {PROMPT_IDS}"
    )


_EXTENDED: dict[str, Callable[[Tensor, _Sample], Tensor]] = {
    "input_ids": lambda _, sample: torch.cat([sample.prompt, sample.completion]),
    "labels": lambda _, sample: sample.labels(),
    "attention_mask": lambda _, sample: torch.ones(len(sample)),
    "completion_mask": lambda _, sample: sample.training_mask(),
    "assistant_masks": lambda _, sample: sample.training_mask(),
    "position_ids": _restarted,
    "token_type_ids": _token_types,
    "mm_token_type_ids": _modalities,
}
"""The rules that extend values per token [B, L] by a completion, by name: all of PER_TOKEN except _LEFT_OUT."""


def _between_padding(is_real_L: Tensor) -> slice:
    real = is_real_L.nonzero().flatten()
    return slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)


def _not_extendable(name: str, value: Any, why: str) -> GKDDataError:
    shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
    return GKDDataError(
        f"a sample can't get a completion of another length: the data collator returned {name}{shape}, which {why}. "
        f"Make it return no {name}, or generate nothing (lmbda=0, seq_kd=False, eval_on_policy=False)"
    )


def _shown(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:16].tolist()))
    return f"[{shown}, …]" if len(values) > 16 else f"[{shown}]"


def _generator(seed: int, stream: int, step: int, position: int) -> np.random.Generator:
    # The counter's low words are left for the draws.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, step]))

"""vLLM's final hidden states of a prompt's tokens (`/pooling`): reading them, and comparing them by a head.

Shapes: V vocabulary, H hidden width, P scored positions of one sequence, L tokens of one, S likely tokens, K top
tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.signals import Head
from gkd_trainer.teachers.prompt_scores import TokenSequence, TopScores
from gkd_trainer.vllm_answers import PooledInput, PooledInputs
from gkd_trainer.vllm_client import RawAnswer

STATE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM's names of the dtypes in which a server can send hidden states."""

_ROWS_AT_ONCE = 16_384
"""Rows of a head to convert to float32 at once."""

_LIKELY_TOKENS = 16
"""How many of the most probable tokens at each position of the witness its comparison takes into account.

For SmolLM2-135M, bf16 is then 0.014 away from float32 (over all tokens 0.016), states sent in fp8 0.024 to 0.042, and
weights rounded to 4 bits 0.40 (0.46).
"""


def states_request(asked: Sequence[TokenSequence], dtype: str) -> dict[str, Any]:
    """Return the body, without the model's name, of a request for the states that predict the scored tokens.

    The last token of each sequence is left out: its state predicts a token that is not scored.
    """
    return {
        "input": [sequence.token_ids[:-1] for sequence in asked],
        "task": "token_embed",
        "use_activation": False,  # else the states are normalised
        "add_special_tokens": False,
        "encoding_format": "bytes",
        "embed_dtype": dtype,
        "endianness": sys.byteorder,
    }


def parse_states(answer: RawAnswer, asked: Sequence[TokenSequence], dtype: str) -> list[Tensor]:
    """Return the states [P, H] that predict the scored tokens of the sequences `asked`, in order, on the CPU.

    They have the requested dtype; fp8 becomes bfloat16, which holds its values exactly. Raises ValueError if the answer
    is not what was requested, or a state is not finite.
    """
    if "metadata" not in answer.headers:
        raise ValueError("the answer has no header metadata, which gives the place of each input's values")
    items = PooledInputs.parse(json.loads(answer.headers["metadata"])).data
    indices = [item.index for item in items]
    if indices != list(range(len(asked))):
        raise ValueError(f"{len(asked)} inputs were sent, but the answer has those of the indices {indices}")
    widths = {item.shape[-1] for item in items if item.shape}
    if len(widths) != 1:
        raise ValueError(f"all states must have the same width; got {sorted(widths)}")
    states, start = [], 0
    for item, sequence in zip(items, asked, strict=True):
        shape = [len(sequence.token_ids) - 1, *widths]
        end = start + shape[0] * shape[1] * STATE_DTYPES[dtype].itemsize
        expected = PooledInput(
            index=item.index, embed_dtype=dtype, endianness=sys.byteorder, start=start, end=end, shape=shape
        )
        if item != expected:
            raise ValueError(f"expected the values {_form(expected)}; got {_form(item)}")
        if end > len(answer.body):
            break
        states_LH = torch.frombuffer(
            answer.body, dtype=STATE_DTYPES[dtype], count=shape[0] * shape[1], offset=start
        ).view(shape)
        states_PH = states_LH[torch.from_numpy(sequence.targets_P - 1)]
        states.append(states_PH.to(torch.bfloat16) if states_PH.dtype.itemsize == 1 else states_PH)
        start = end
    if len(states) < len(asked) or start != len(answer.body):
        raise ValueError(f"the header promises values up to byte {items[-1].end}; got {len(answer.body)} bytes")
    if not all(torch.isfinite(states_PH).all() for states_PH in states):
        raise ValueError(f"a hidden state is not finite in {dtype}")
    return states


def narrowest_dtype(states_PH: Tensor) -> str:
    """Return the name of the narrowest dtype that holds float32 states without rounding; never fp8."""
    return next(
        (
            name
            for name in ("bfloat16", "float16")
            if torch.equal(states_PH.to(STATE_DTYPES[name]).to(states_PH.dtype), states_PH)
        ),
        "float32",
    )


def log_probs(states_PH: Tensor, head: Head) -> Tensor:
    """Return log p [P, V] of states in float32, on the head's device."""
    states_PH = states_PH.to(head.weight_VH.device)
    parts = [
        _rows(head, slice(start, start + _ROWS_AT_ONCE)).logits(states_PH)
        for start in range(0, head.weight_VH.shape[0], _ROWS_AT_ONCE)
    ]
    return torch.cat(parts, dim=1).log_softmax(dim=1)


def top_scores(states_PH: Tensor, head: Head, count: int) -> TopScores:
    """Return the `count` most probable tokens of each state's distribution, or all if there are fewer."""
    log_p_PK, ids_PK = log_probs(states_PH, head).topk(min(count, head.weight_VH.shape[0]))
    return TopScores(ids_PK.cpu().numpy(), log_p_PK.cpu().double().numpy())


def likely_head(states_PH: Tensor, head: Head) -> Head:
    """Return the rows [S, H] of the tokens that are likely at some position, in float32 on the CPU.

    They suffice to compare the states of a text, for hardly any work.
    """
    count = min(_LIKELY_TOKENS, head.weight_VH.shape[0])
    ids_S = log_probs(states_PH, head).topk(count).indices.unique()
    rows = _rows(head, ids_S)
    return replace(
        rows,
        weight_VH=rows.weight_VH.float().cpu(),
        bias_V=None if rows.bias_V is None else rows.bias_V.float().cpu(),
    )


def mean_total_variation(log_p_PV: Tensor, other_log_p_PV: Tensor) -> float:
    """Return the total variation of two distributions, averaged over positions."""
    return float((log_p_PV.exp() - other_log_p_PV.exp()).abs().sum(dim=1).mean() / 2)


def _rows(head: Head, rows: slice | Tensor) -> Head:
    return replace(head, weight_VH=head.weight_VH[rows], bias_V=None if head.bias_V is None else head.bias_V[rows])


def _form(item: PooledInput) -> str:
    return f"{item.shape} in {item.embed_dtype}, {item.endianness}-endian, in bytes {item.start} to {item.end}"

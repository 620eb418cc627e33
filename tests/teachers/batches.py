"""Batches of random tokens with prompts, turns, gaps and padding, for teachers to score."""

import torch

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.types import TokenBatch


def token_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 365, (length,), generator=generator).tolist() for length in lengths]


def batch_of(rows, labels, side="right"):
    """Pad rows and their labels to a batch; labels may be given as the indices of the tokens trained on."""
    longest = max(map(len, rows))
    padded = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, trained in zip(rows, labels, strict=True):
        padding = longest - len(row)
        values = {
            "input_ids": (row, 2),
            "attention_mask": ([1] * len(row), 0),
            "labels": ([token if i in trained else IGNORE_INDEX for i, token in enumerate(row)], IGNORE_INDEX),
        }
        for key, (real, fill) in values.items():
            padded[key].append(real + [fill] * padding if side == "right" else [fill] * padding + real)
    return TokenBatch.from_inputs({key: torch.tensor(value) for key, value in padded.items()})


def batch_of_six(side="right"):
    """Rows of a prompt and a completion, of two turns, of gaps, without labels, of one token, and trained in full."""
    rows = token_rows([12, 17, 9, 14, 7, 11])
    trained = [range(5, 12), [4, 5, 6, 11, 12, 13, 14], [1, 3, 5, 6], [], [6], range(1, 11)]
    return batch_of(rows, trained, side)

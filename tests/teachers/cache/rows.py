"""Rows, and a teacher whose predictions can be recomputed: they depend only on the tokens up to their position."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from gkd_trainer.signals import Head, HiddenSignal, TopKSignal
from gkd_trainer.teachers.cache import CacheSource, CacheWriter
from gkd_trainer.teachers.prompt_scores import sequences_of
from gkd_trainer.types import TokenBatch

V, H, K = 368, 70, 5  # H is no multiple of a group of channels
_NUMBERS = np.random.default_rng(0)
_TABLE_SH = torch.from_numpy(_NUMBERS.normal(size=(997, H))).float()
# Channels of different size and mean, as models have them.
_TABLE_SH[:, 3] *= 40
_TABLE_SH[:, 5] += 25
WEIGHT_VH = torch.from_numpy(_NUMBERS.normal(size=(V, H))).float() / 20
VOCABULARY = {f"token{index}": index for index in range(V)}


def make_rows(count=12, seed=0, longest=12):
    """Pairs of token ids and labels; the labels of some rows have a gap."""
    numbers = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = numbers.integers(4, V, size=numbers.integers(4, longest)).tolist()
        n_prompt = int(numbers.integers(1, len(ids) - 1))
        labels = [-100] * n_prompt + ids[n_prompt:]
        if index % 3 == 0 and len(labels) - n_prompt > 2:
            labels[n_prompt + 1] = -100
        rows.append((ids, labels))
    return rows


def batch_of(rows, side="right"):
    """A batch of rows, padded."""
    ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*rows, strict=True))
    pad = {"batch_first": True, "padding_side": side}
    return TokenBatch.from_inputs(
        {
            "input_ids": pad_sequence(ids, **pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], **pad),
            "labels": pad_sequence(labels, padding_value=-100, **pad),
        }
    )


def sequence_of(ids, labels):
    [sequence] = sequences_of(batch_of([(ids, labels)]))
    return sequence


def states_of(sequence, dtype=torch.float32):
    """The hidden states [P, H] of a sequence, from its tokens alone."""
    sums = np.cumsum(sequence.token_ids)[sequence.targets_P - 1]
    return _TABLE_SH[sums % 997].to(dtype)


def hidden_signal(batch, dtype=torch.float32):
    hidden = [states_of(sequence, dtype) for sequence in sequences_of(batch)]
    return HiddenSignal(torch.cat(hidden), Head(WEIGHT_VH.to(dtype), scale=0.5, softcap=30.0))


def top_signal(batch):
    logits_NV = torch.cat([states_of(sequence) for sequence in sequences_of(batch)]) @ WEIGHT_VH.T
    top = logits_NV.log_softmax(-1).topk(K)
    return TopKSignal(top.indices, top.values, V)


def source(**changes):
    return CacheSource(**{"teacher": "oracle", "weights": "abc", "vocab_size": V, "max_length": 64, **changes})


def write(folder, rows, *, kind="hidden", dtype=torch.bfloat16, shard_mb=256.0, batch_size=4, **options):
    """Write a cache of rows; those that it has are skipped."""
    options = {"vocabulary": VOCABULARY, **options}
    with CacheWriter(folder, options.pop("source", source()), kind=kind, shard_mb=shard_mb, **options) as writer:
        new = [row for row in rows if not writer.has(sequence_of(*row))]
        for start in range(0, len(new), batch_size):
            batch = batch_of(new[start : start + batch_size])
            writer.add(batch, top_signal(batch) if kind == "topk" else hidden_signal(batch, dtype))
    return writer.manifest


def cut(row, length):
    """A row without its tokens from `length` on."""
    ids, labels = row
    return ids[:length], labels[:length]

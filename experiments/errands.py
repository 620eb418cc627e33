"""A task in which the student's own mistakes matter: walk to several places on a grid, in order, without a map.

A prompt names a start and PLACES places by their coordinates. The answer is a walk: one token per step (east, west,
north, south), a visit at each place, and a stop. Any tokens are a walk: a step off the grid stays where it is, and a
visit to anything but the next place changes nothing. Nothing in the answer says where the walker is, so a model that
once goes wrong is where no demonstration passes. Demonstrations go straight: along x, then along y. The teacher learnt
from walks with random tokens among them, which it had to make good, so it knows the way from anywhere.

Shapes: B batch, L length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gkd_trainer.batch_keys import IGNORE_INDEX

SIZE = 6
PLACES = 4
PAD, START, STOP, VISIT = range(4)
MOVES = {4: (1, 0), 5: (-1, 0), 6: (0, 1), 7: (0, -1)}
_FIRST_X = 4 + len(MOVES)
_FIRST_Y = _FIRST_X + SIZE
VOCABULARY = _FIRST_Y + SIZE
MAX_NEW_TOKENS = 2 * SIZE * PLACES
"""More than the longest direct walk, 2·(SIZE - 1)·PLACES steps, visits and the stop included."""

Point = tuple[int, int]


@dataclass(frozen=True)
class Errand:
    """A start and the places to visit, in order."""

    start: Point
    places: tuple[Point, ...]

    @classmethod
    def drawn(cls, numbers: random.Random) -> Errand:
        """Draw one."""
        points = [(numbers.randrange(SIZE), numbers.randrange(SIZE)) for _ in range(PLACES + 1)]
        return cls(points[0], tuple(points[1:]))

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return [START, *(token for x, y in (self.start, *self.places) for token in (_FIRST_X + x, _FIRST_Y + y))]

    def demonstration(self) -> list[int]:
        """Return the direct walk."""
        walk = Walk(self)
        while not walk.is_over:
            walk.take(walk.best())
        return walk.tokens

    def is_done_by(self, tokens: Sequence[int]) -> bool:
        """Return whether a walk visits all places in order and then stops, by whatever way."""
        walk = Walk(self)
        for token in tokens:
            if walk.is_over:
                return False
            walk.take(token)
        return walk.is_over and walk.visited == len(self.places)


class Walk:
    """A walk so far: where it is, and how many places it has visited."""

    def __init__(self, errand: Errand) -> None:
        self.errand, self.at, self.visited = errand, errand.start, 0
        self.tokens: list[int] = []
        self.is_over = False

    def best(self) -> int:
        """Return the token of the direct way from here."""
        if self.visited == len(self.errand.places):
            return STOP
        (x, y), (goal_x, goal_y) = self.at, self.errand.places[self.visited]
        if x != goal_x:
            return 4 if x < goal_x else 5
        if y != goal_y:
            return 6 if y < goal_y else 7
        return VISIT

    def distance(self) -> int:
        """Return the number of steps to the next place."""
        (x, y), (goal_x, goal_y) = self.at, self.errand.places[self.visited]
        return abs(x - goal_x) + abs(y - goal_y)

    def take(self, token: int) -> None:
        """Go on by a token."""
        self.tokens.append(token)
        if token == STOP:
            self.is_over = True
        elif token == VISIT and token == self.best():
            self.visited += 1
        elif token in MOVES:
            (x, y), (east, north) = self.at, MOVES[token]
            self.at = (_on_grid(x + east), _on_grid(y + north))


def _on_grid(coordinate: int) -> int:
    return min(max(coordinate, 0), SIZE - 1)


def errands(count: int, seed: int | str) -> list[Errand]:
    """Draw errands."""
    numbers = random.Random(f"errands {seed}")
    return [Errand.drawn(numbers) for _ in range(count)]


def row_of(errand: Errand, completion: Sequence[int]) -> dict[str, Any]:
    """Return an errand and a walk as a row of tokens."""
    prompt = errand.prompt
    return {"input_ids": [*prompt, *completion], "labels": [*[IGNORE_INDEX] * len(prompt), *completion]}


def corrupted(errand: Errand, numbers: random.Random) -> list[int]:
    """Return the beginning of the direct walk, with a wrong step as its last, in the walk's first half."""
    tokens = errand.demonstration()
    steps = [index for index, token in enumerate(tokens[: max(1, len(tokens) // 2)]) if token in MOVES] or [0]
    cut = numbers.choice(steps)
    wrong = [token for token in MOVES if token != tokens[cut]]
    return [*tokens[:cut], numbers.choice(wrong)]


def effect_of_wrong_step(errand: Errand, beginning: Sequence[int]) -> str:
    """Return where the last step of a `corrupted` beginning leads: "away" from the goal, "nearer", or "nowhere"."""
    walk = Walk(errand)
    for token in beginning[:-1]:
        walk.take(token)
    before = walk.distance()
    walk.take(beginning[-1])
    return {1: "away", -1: "nearer", 0: "nowhere"}[walk.distance() - before]


def model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights; a head has 16 channels or more."""
    torch.manual_seed(seed)
    heads = max(2, hidden // 32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=STOP,
            tie_word_embeddings=True,
        )
    )


def trained_teacher(steps: int, seed: int, *, hidden: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """Return a teacher trained on walks with random tokens among them, which are not trained on themselves."""
    teacher = model(hidden, layers, seed)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), 4e-5),
        ],
        [warmup],
    )
    for inputs in _noisy_batches(steps, seed):
        loss = teacher(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return teacher.eval()


def _noisy_batches(steps: int, seed: int, *, batch_size: int = 64, noise: float = 0.1) -> Iterator[dict[str, Any]]:
    numbers = random.Random(f"teacher {seed}")
    for _ in range(steps):
        rows = [_noisy_row(Errand.drawn(numbers), numbers, noise) for _ in range(batch_size)]
        length = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": PAD, "labels": IGNORE_INDEX}
        batch_BL = {
            name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
            for name, value in padding.items()
        }
        yield {**batch_BL, "attention_mask": (batch_BL["input_ids"] != PAD).long()}


def _noisy_row(errand: Errand, numbers: random.Random, noise: float) -> dict[str, Any]:
    walk, labels = Walk(errand), list[int]()
    while not walk.is_over:
        best = walk.best()
        if numbers.random() < noise and best != STOP:
            walk.take(numbers.choice([VISIT, *MOVES]))
            labels.append(IGNORE_INDEX)
        else:
            walk.take(best)
            labels.append(best)
    row = row_of(errand, walk.tokens)
    return {**row, "labels": [*[IGNORE_INDEX] * len(errand.prompt), *labels]}

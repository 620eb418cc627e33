"""The ways to train a student that are compared, and the pairs of them whose difference answers a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        description: What the student learns from, for tables.
        loss: "cross-entropy" needs no teacher while it trains; "divergence" is GKDTrainer's.
        data: "data" are the task's own completions; "teacher" one completion for each prompt, sampled by the teacher
            before training.
        options: Options of GKDConfig.
        as_long_as: The arm whose processor time this one gets; None for as many steps as all others.
    """

    description: str
    loss: Literal["cross-entropy", "divergence"] = "divergence"
    data: Literal["data", "teacher"] = "data"
    options: Mapping[str, Any] = field(default_factory=dict)
    as_long_as: str | None = None


_FRESH = {"lmbda": 0.0, "seq_kd": True}
_OWN = {"lmbda": 1.0}
_BETAS = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}
_NAMES = {"forward": "forward KL", "jsd": "JSD", "reverse": "reverse KL"}

ARMS: dict[str, Arm] = {
    "sft": Arm("cross-entropy, the data", loss="cross-entropy"),
    "sft-longer": Arm("cross-entropy, the data, for as long as own-jsd", loss="cross-entropy", as_long_as="own-jsd"),
    "seq-kd": Arm("cross-entropy, one sample of the teacher per prompt", loss="cross-entropy", data="teacher"),
    **{
        f"fixed-{name}": Arm(f"{_NAMES[name]}, the data", options={"lmbda": 0.0, "beta": beta})
        for name, beta in _BETAS.items()
    },
    **{
        f"fresh-{name}": Arm(f"{_NAMES[name]}, fresh samples of the teacher", options={**_FRESH, "beta": beta})
        for name, beta in _BETAS.items()
    },
    **{
        f"own-{name}": Arm(f"{_NAMES[name]}, the student's samples", options={**_OWN, "beta": beta})
        for name, beta in _BETAS.items()
    },
    "mixed-jsd": Arm("JSD, data and the student's samples in equal shares", options={"lmbda": 0.5, "beta": 0.5}),
    "rising-jsd": Arm(
        "JSD, from the data to the student's samples",
        options={"lmbda": 0.0, "lmbda_end": 1.0, "lmbda_schedule": "linear", "beta": 0.5},
    ),
    "fixed-tv": Arm("total variation, the data", options={"lmbda": 0.0, "divergence": "total_variation"}),
    "own-tv": Arm("total variation, the student's samples", options={**_OWN, "divergence": "total_variation"}),
}
"""All arms by name, in the order of the tables."""

TEACHER = "teacher"
"""In place of an arm: the teacher itself is measured."""

START = "start"
"""In tables, beside the arms: what all of them start from."""

DECISIVE = ("fixed-forward", "fresh-forward", "own-forward")
"""The arms of grids that vary something else: the same loss on the three kinds of samples."""

FEW = ("sft", *DECISIVE, "own-reverse")
"""The arms of a small grid."""

PAIRS: tuple[tuple[str, str], ...] = (
    *((f"own-{name}", f"fixed-{name}") for name in _BETAS),
    *((f"own-{name}", f"fresh-{name}") for name in _BETAS),
    *((f"fresh-{name}", f"fixed-{name}") for name in _BETAS),
    ("own-tv", "fixed-tv"),
    ("mixed-jsd", "fixed-jsd"),
    ("rising-jsd", "own-jsd"),
    ("own-jsd", "sft-longer"),
    ("fixed-forward", "sft"),
    ("seq-kd", "sft"),
)
"""Pairs (an arm, its control) that differ in one thing."""

LOSS_PAIRS = (("fixed-jsd", "fixed-forward"), ("fresh-jsd", "fresh-forward"))
"""Pairs that differ in the loss alone. The plan does not ask for these."""


def is_timed(arm: str) -> bool:
    """Return whether a run needs the processor time of another one, and so comes after it."""
    return arm != TEACHER and ARMS[arm].as_long_as is not None

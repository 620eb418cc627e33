"""What a study is: a task, the runs of its grids, and what they share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal

from filelock import FileLock

from experiments.arms import ARMS
from experiments.training import Setting, trained

Grid = Literal["small", "full"]


@dataclass(frozen=True)
class Run:
    """One student to train: in which way, with which seed, for how many steps, and what else varies in the grid."""

    arm: str
    seed: int
    steps: int
    factors: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, object]:
        """The fields by which its result is found."""
        return {"arm": self.arm, "seed": self.seed, "steps": self.steps, "factors": dict(self.factors)}


class Study(ABC):
    """A task on which all arms are compared."""

    name: ClassVar[str]
    """The name of its file of results."""

    decisive: ClassVar[tuple[str, ...]]
    """The measures that decide, higher is better; each point also has them by prompt, in `by_prompt`."""

    measures: ClassVar[Mapping[str, str]]
    """The measures of the tables, with their titles."""

    @property
    def kinds(self) -> Mapping[str, Sequence[str]]:
        """The kind of each prompt, in order, for decisive measures that are also shown by kind."""
        return {}

    @abstractmethod
    def runs(self, grid: Grid) -> list[Run]:
        """Return the runs of a grid; one that needs the time of another comes after it."""

    @abstractmethod
    def setting(self, run: Run) -> Setting:
        """Return what the run shares with others: models, rows and options."""


def make_start(folder: Path, setting: Setting, arm: str, seed: int, steps: int) -> None:
    """Train a student from which others start, and save it in a folder, unless it is there."""
    rows = json.dumps([dict(row) for row in setting.rows[ARMS[arm].data](seed)])
    plan = {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "rows": sha256(rows.encode()).hexdigest(),
        **setting.options,
        **setting.own_options,
    }
    with made_once(folder, plan) as is_missing:
        if is_missing:
            student, _ = trained(setting, ARMS[arm], seed, steps, measures=False)
            student.save_pretrained(folder)


@contextmanager
def made_once(folder: Path, plan: Mapping[str, object]) -> Iterator[bool]:
    """Yield whether a folder of models has yet to be made; other processes that need it wait until it is there.

    Raises SystemExit if it was made by another plan, of which some results may be too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        done = folder / "plan.json"  # written last
        is_missing = not done.exists()
        if not is_missing and (made_by := json.loads(done.read_text())) != plan:
            changed = sorted(name for name in {*made_by, *plan} if made_by.get(name) != plan.get(name))
            raise SystemExit(
                f"{folder} was made by another plan ({', '.join(changed)}): delete it, and the results of runs that "
                "used it"
            )
        yield is_missing
        done.write_text(json.dumps(plan))

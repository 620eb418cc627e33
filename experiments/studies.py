"""What a study is: a task, the runs of its grids, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from filelock import FileLock

from experiments.training import Setting

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


@contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Yield whether a folder of models has yet to be made; other processes that need it wait until it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        done = folder / "complete"
        yield not done.exists()
        done.touch()

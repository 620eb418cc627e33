"""The teacher of each row: a name in the row, or a function's answer, becomes an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd_trainer.batch_keys import TEACHER_INDEX
from gkd_trainer.errors import GKDDataError


@dataclass(frozen=True)
class TeacherRoute:
    """How a row gets one of several teachers, as an index into `names`; can be pickled if `function` can.

    `function` returns the name for a row as the dataset has it; None reads the row's `column`. Without that column, a
    row's own TEACHER_INDEX counts.
    """

    names: Sequence[str]
    column: str = "teacher"
    function: Callable[[Mapping[str, Any]], str] | None = None

    def index_of(self, row: Mapping[str, Any]) -> int:
        """Return the index of a row's teacher.

        Raises:
            GKDDataError: The row names no teacher, or one that does not exist.

        """
        known = ", ".join(map(repr, self.names))
        if self.function is None and self.column not in row:
            index = row.get(TEACHER_INDEX)
            if isinstance(index, int) and 0 <= index < len(self.names):
                return index
            if index is not None:
                raise GKDDataError(
                    f"expected {TEACHER_INDEX} to be the index of one of the teachers {known}, from 0 to "
                    f"{len(self.names) - 1}; got {index!r}"
                )
            raise GKDDataError(
                f"expected a column {self.column!r} with the name of each row's teacher, one of {known}; got the "
                f"columns {sorted(row)}: add it, set teacher_column, or pass `route` to RoutedTeachers"
            )
        name = row[self.column] if self.function is None else self.function(row)
        if isinstance(name, str) and name in self.names:
            return self.names.index(name)
        source = f"the column {self.column!r} holds" if self.function is None else "`route` returned"
        raise GKDDataError(f"expected one of the teachers {known} for each row; {source} {name!r}: correct the name")

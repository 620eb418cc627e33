"""The keys by which a user's teacher recognises the rows of a dataset (see ROW_KEY)."""

from __future__ import annotations

import operator
from typing import Any

from gkd_trainer.batch_keys import ROW_KEY
from gkd_trainer.errors import GKDDataError

_FIRST, _LAST = -(2**63), 2**63 - 1


def checked_key(value: Any, row: str, name: str = ROW_KEY) -> int:
    """Return a row's key, or another integer of the column `name`, as an int.

    Raises:
        GKDDataError: It is not a 64-bit integer; the error calls the row `row`.

    """
    try:
        key = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        key = None
    if key is None or not _FIRST <= key <= _LAST:
        raise GKDDataError(
            f"{row}: expected a 64-bit integer as {name}; got {value!r}: number the rows, or rename the column"
        )
    return key

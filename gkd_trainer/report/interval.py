"""How often a run is logged by default."""

from __future__ import annotations

MAX_STEPS = 500


def tenth_of(max_steps: int) -> int:
    """Return the number of optimizer steps between log entries: a tenth of the run, within 1 to 500."""
    return min(MAX_STEPS, max(1, max_steps // 10))

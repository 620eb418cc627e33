"""How often a run is logged where its configuration leaves that open."""

from __future__ import annotations

MAX_STEPS = 500


def tenth_of(max_steps: int) -> int:
    """Return how many optimizer steps are between two log entries of a run: a tenth of it, from 1 to 500."""
    return min(MAX_STEPS, max(1, max_steps // 10))

"""How often a run is logged if its configuration does not say."""

from __future__ import annotations

MAX_STEPS = 500


def tenth_of(max_steps: int) -> int:
    """Return the number of optimizer steps from one log entry to the next: a tenth of the run, within 1 to 500."""
    return min(MAX_STEPS, max(1, max_steps // 10))

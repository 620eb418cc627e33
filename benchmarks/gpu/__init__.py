"""Checks and measurements on a GPU, in stages that each fit a short loan of one: see docs/performance.md."""

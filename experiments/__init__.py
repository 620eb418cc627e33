"""Experiments on what the method gains, and against which controls: docs/evidence.md says what is measured and why."""

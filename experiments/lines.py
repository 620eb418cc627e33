"""Results as lines of JSON: one for each run, appended when it is complete, so that a killed experiment goes on."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "trl", "gkd_trainer")


class Lines:
    """The results in a file. Several processes may add to it at once."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[dict[str, Any]]:
        """Return the complete results; a line cut short by a kill is left out."""
        if not self.file.exists():
            return []
        results = []
        for line in self.file.read_text().splitlines():
            try:
                results.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return results

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the result whose fields have these values."""
        return next((line for line in self.read() if all(line.get(name) == value for name, value in key.items())), None)

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a result, with the versions that it was obtained with and the time, and flush it to the disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that was cut short stays apart
                    file.write(b"\n")
            made = {
                "versions": versions(),
                "commit": commit(),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            file.write(json.dumps({**result, **made}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Return the versions that results may depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


@cache
def commit() -> str | None:
    """Return the commit of this code, "-dirty" behind it if files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()

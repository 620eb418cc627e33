"""Packages to carry to a machine without a network: what GKDTrainer and the peers of the loss need beside torch.

Not carried, since they are compiled and large: torch and Triton, and pyarrow, pandas, xxhash and numpy, which datasets
needs. Where those are missing, the cells of GKDTrainer and TRL are not measured; the others need none of them.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOTS = ("trl", "datasets", "liger-kernel", "tenacity", "pydantic", "httpcore", "pytest", "pytest-timeout")

NEEDS = (
    *("dill", "multiprocess", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "h11"),
    *("certifi", "iniconfig", "pluggy", "pygments", "python-dateutil", "six", "tzdata"),
)
"""What ROOTS need and a machine with transformers may lack. Only pydantic-core is compiled, and it takes 2 MB."""

COMPILED = ("pyarrow", "pandas", "xxhash")
"""What datasets needs, and is not carried unless asked for."""


def gather(folder: Path, python: str, platforms: Sequence[str], also: Sequence[str], constraints: Path) -> list[Path]:
    """Download the wheels for a version of Python, and return them.

    Args:
        folder: Where they go.
        python: The other machine's version, such as "3.12".
        platforms: Its platforms, of which a wheel has one, such as "manylinux_2_28_x86_64".
        also: Further packages, such as pyarrow.
        constraints: The versions of this repository.

    Raises:
        SystemExit: A package could not be had, with pip's reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    due = [*ROOTS, *also]
    seen: set[str] = set()
    while due:
        _download(folder, due, python, platforms, constraints)
        seen |= {canonicalize_name(Requirement(text).name) for text in due}
        found = {needed.name: needed for wheel in folder.glob("*.whl") for needed in _needs(wheel)}
        due = [str(need) for name, need in found.items() if name in NEEDS and name not in seen]
    return sorted(folder.glob("*.whl"))


def install(folder: Path, target: Path) -> list[str]:
    """Install into `target` what is not installed here, and return the names.

    Raises:
        SystemExit: There are no wheels that fit this Python, or pip refused them.
    """
    tags = set(sys_tags())
    found = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in sorted(folder.glob("*.whl")) if _fits(wheel, tags)}
    if not found:
        raise SystemExit(
            f"--wheels {folder} must hold wheels for Python {sys.version_info.major}.{sys.version_info.minor}; got "
            "none: python -m benchmarks.gpu gather makes them, where there is a network"
        )
    missing = {name: wheel for name, wheel in found.items() if not _is_installed(name)}
    if missing:
        wheels = list(map(str, missing.values()))
        _pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(target), "--upgrade", *wheels)
    return sorted(missing)


def _download(folder: Path, packages: Sequence[str], python: str, platforms: Sequence[str], constraints: Path) -> None:
    tags = [option for platform in platforms for option in ("--platform", platform)]
    _pip(
        "download",
        *("--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *tags),
        *("--constraint", str(constraints), "--dest", str(folder), *packages),
    )


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        raise SystemExit(f"pip could not {arguments[0]} packages: {reason} (only `gather` needs a package index)")


def _needs(wheel: Path) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(file.read(name).decode("utf-8"))
    for text in metadata.get_all("Requires-Dist") or []:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            needed.marker, needed.name = None, canonicalize_name(needed.name)
            yield needed


def _fits(wheel: Path, tags: set[object]) -> bool:
    return bool(parse_wheel_filename(wheel.name)[3] & tags)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

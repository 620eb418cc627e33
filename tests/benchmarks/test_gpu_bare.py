"""The stages of `make gpu` where only their requirements are installed, as on many machines for GPUs."""

import json
import os
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.wheels import NEEDS, ROOTS

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ("torch", "triton", "transformers", "peft", "accelerate", "pytest", "pytest-timeout", "rich", "jinja2")

# In one process: importing torch and transformers takes longer than all the rest.
SCRIPT = r"""
import json
import os
from importlib.util import find_spec

os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
import pytest
from benchmarks.gpu import checks

class Collected:
    def __init__(self):
        self.files, self.missing = set(), set()

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.files.add(os.path.relpath(item.path))
            known = {"request", *item._fixtureinfo.name2fixturedefs}
            self.missing |= {(item.nodeid, name) for name in item.fixturenames if name not in known}

found = {"installed": [name for name in ("datasets", "pandas", "PIL", "trl") if find_spec(name) is not None]}
files = [file for file in checks.files_with_gpu_tests() if not file.startswith(checks._WITH_FIXTURES)]
collected = Collected()
found["collection"] = pytest.main(["--collect-only", "-qq", "--noconftest", "-m", "gpu", *files], [collected])
found["files"] = [files, sorted(collected.files)]
found["missing"] = sorted(collected.missing)

import tests.conftest
from benchmarks.gpu import loss, steps
from benchmarks.gpu.cells import Where, _outcome

cases = [f"tests/divergence/{name}.py" for name in ("triton_cases", "triton_topk_cases", "test_layouts")]
some = "one_row or no_rows or padded_rows or no_tokens"
found["cases"] = pytest.main(["-q", "--noconftest", "-W", "ignore", "-k", some, *cases])

where, cells = Where("cpu", is_small=True), {}
for stage in (loss, steps):
    for cell in stage.cells(where):
        cells.setdefault((stage.__name__, cell.part, cell.key.get("contender")), cell)
found["cells"] = [(cell.title, _outcome(cell, where)) for cell in cells.values()]
print(json.dumps(found))
"""


@pytest.fixture
def bare_python(tmp_path):
    """The interpreter of an environment with REQUIREMENTS, which are links to the installed ones, and no more."""
    pytest.importorskip("triton")
    venv.EnvBuilder(symlinks=True).create(tmp_path / "bare")
    [packages] = (tmp_path / "bare").glob("lib/python*/site-packages")
    for package in needed(REQUIREMENTS):
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))
    return tmp_path / "bare" / "bin" / "python"


def needed(names):
    """Yield the distributions of these names, and those that they need."""
    due, seen = list(names), set()
    while due:
        name = canonicalize_name(due.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # a library of CUDA, with a torch for CPUs
            continue
        yield package
        requirements = map(Requirement, package.requires or ())
        due += [need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_with_only_their_requirements_all_tests_of_the_divergence_and_all_cells_run_that_need_no_more(bare_python):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [bare_python, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["installed"] == []
    wanted, collected = found["files"]
    assert collected == wanted, done.stdout
    assert {f"tests/divergence/test_{name}.py" for name in ("triton", "triton_topk", "projection")} < set(wanted)
    assert found["collection"] == 0
    assert found["missing"] == []  # fixtures of conftest.py, which `checks` leaves out
    assert found["cases"] == 0, done.stdout
    assert {outcome["status"] for _, outcome in found["cells"]} == {"measured", "not measured"}, found["cells"]
    assert all("not installed" in outcome.get("why", "not installed") for _, outcome in found["cells"])


def test_what_is_carried_is_all_that_it_needs_beside_the_requirements_and_what_is_large():
    carried, there = ({canonicalize_name(package.name) for package in needed(names)} for names in (ROOTS, REQUIREMENTS))
    assert carried - there - {*ROOTS, *NEEDS} <= {"pyarrow", "pandas", "xxhash"}

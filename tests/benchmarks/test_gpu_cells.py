"""The cells of a stage: what a failure costs, and when results are written."""

import json
import time

import pytest

from benchmarks.gpu.cells import Cell, Where, _outcome, run_stage
from tests.benchmarks import sample_cells

TINY = Where("cpu", is_small=True)


def run(cells, folder, where=TINY, minutes=5.0):
    """Whether nothing failed, and the outcomes by part."""
    is_right = run_stage("stage", cells, where, folder, minutes)
    results = json.loads((folder / "stage.json").read_text())
    return is_right, results, {outcome["part"]: outcome for outcome in results["cells"]}


def test_a_failure_a_crash_and_a_lack_of_memory_or_of_a_package_cost_their_own_cell(tmp_path):
    file = str(tmp_path / "stage.json")
    is_right, results, outcomes = run(
        [
            Cell("first", sample_cells.double, 1, {"number": 21}),
            Cell("memory", sample_cells.fill_the_memory, 1),
            Cell("package", sample_cells.need_a_package, 1),
            Cell("tool", sample_cells.need_a_tool, 1),
            Cell("failure", sample_cells.fail, 1),
            Cell("crash", sample_cells.crash, 1),
            Cell("seen", sample_cells.see_statuses, 1, {"file": file}),
            Cell("last", sample_cells.double, 1, {"number": 4}),
        ],
        tmp_path,
    )
    assert not is_right
    assert results["about"]["versions"]["torch"]
    assert outcomes["first"]["figures"] == {"double": 42, "device": "cpu"}
    assert outcomes["memory"]["status"] == "out of memory"
    assert "2.00 GiB" in outcomes["memory"]["why"]
    assert (outcomes["package"]["status"], outcomes["package"]["why"]) == (
        "not measured",
        "not installed: no_such_package",
    )
    assert (outcomes["tool"]["status"], outcomes["tool"]["why"]) == ("not measured", "the tool is not there")
    assert outcomes["failure"]["why"] == "ValueError: a typing error"
    assert "sample_cells.py" in outcomes["failure"]["traceback"]
    assert outcomes["crash"]["why"] == "its process ended with exit status 3"
    # Each outcome was in the file before the next cell began.
    statuses = ["measured", "out of memory", *["not measured"] * 2, *["failed"] * 2, "waiting", "waiting"]
    assert outcomes["seen"]["figures"]["statuses"] == statuses
    assert outcomes["last"]["figures"]["double"] == 8


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_a_card_that_is_full_is_a_result_in_whichever_words(message):
    def measure(where):
        raise RuntimeError(message)

    assert _outcome(Cell("full", measure, 1), TINY) == {"status": "out of memory", "why": message}


def test_a_cell_that_hangs_is_stopped_when_the_stages_time_is_over(tmp_path):
    began = time.monotonic()
    is_right, _, outcomes = run([Cell("hang", sample_cells.hang, 1)], tmp_path, minutes=0.02)
    assert not is_right
    assert outcomes["hang"]["why"] == "it was stopped after 1 s"
    assert time.monotonic() - began < 60


def test_a_cell_that_no_longer_fits_is_skipped_and_the_file_says_why(tmp_path):
    cell = Cell("long", sample_cells.double, 30, {"number": 1})
    is_right, _, outcomes = run([cell], tmp_path, Where("cpu", is_small=False), minutes=0.1)
    assert is_right
    assert outcomes["long"]["status"] == "skipped"
    assert "takes about 30 s" in outcomes["long"]["why"]
    assert "of 0.1 minutes" in outcomes["long"]["why"]

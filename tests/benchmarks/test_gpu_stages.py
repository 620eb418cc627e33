"""The stages of `make gpu`: whole, in tiny sizes on the CPU, as they run on a card."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import checks, loss, steps
from benchmarks.gpu.card import description
from benchmarks.gpu.cells import NotMeasuredError, Where
from benchmarks.gpu.models import SIZES, random_model, vocabulary_size
from gkd_trainer.types import TokenBatch

ROOT = Path(__file__).parents[2]
TINY = Where("cpu", is_small=True)
FULL = Where("cuda", is_small=False)


def test_make_gpu_measures_each_cell_of_each_stage(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        ["make", "gpu", "DEVICE=cpu", "SMALL=1", f"PYTHON={sys.executable}", f"ARGS=--results {tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage, module in (("checks", checks), ("loss", loss), ("steps", steps)):
        results = json.loads((tmp_path / f"{stage}.json").read_text())
        outcomes = [(outcome["part"], outcome["key"], outcome["status"]) for outcome in results["cells"]]
        assert [(part, key) for part, key, _ in outcomes] == [
            (cell.part, dict(cell.key)) for cell in module.cells(TINY)
        ]
        absent = {name for name, package in (("liger", "liger_kernel"), ("trl", "trl")) if find_spec(package) is None}
        absent.add("liger-kernel")  # only for GPUs
        for part, key, status in outcomes:
            is_absent = key.get("contender") in absent or (absent & {"trl"} and key.get("contender") == "trl-gkd")
            assert status == ("not measured" if is_absent else "measured"), (part, key)
    for title in ("Tests marked `gpu`", "Forward and backward of the divergence", "Steps of a 0.5B student"):
        assert title in done.stdout


@pytest.mark.parametrize("stage", [checks, loss, steps])
def test_all_cells_of_a_stage_fit_into_its_minutes(stage):
    assert sum(cell.seconds for cell in stage.cells(FULL)) <= 8.5 * 60


def test_the_full_stages_have_all_shapes_teachers_policies_and_contenders():
    timed = {(cell.key["shape"], cell.key["contender"]) for cell in loss.cells(FULL) if cell.part == "time"}
    assert {
        (shape, contender) for shape in loss.SHAPES for contender in ("ours", "torch", "trl", "liger-kernel")
    } <= timed
    stepped = {tuple(cell.key.values()) for cell in steps.cells(FULL)}
    assert len(stepped) == 2 * 2 * 2 * 3
    assert ("7B", "on", "LoRA", "logits") in stepped


def test_the_tests_marked_gpu_are_found():
    found = checks.files_with_gpu_tests()
    assert {
        "tests/divergence/test_triton.py",
        "tests/report/test_metrics.py",
        "tests/models/test_top_tokens.py",
    } <= set(found)
    assert "tests/benchmarks/test_gpu_stages.py" not in found  # it only writes such a test


def write_tests(folder, text):
    file = folder / "test_something.py"
    file.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{text}")
    return str(file)


def test_tests_that_run_in_a_process_of_their_own_are_named_if_they_fail(tmp_path):
    output = r"....... [ 41%]\nFAILED tests/cases.py::test_a - assert 1\n1 failed"
    figures = checks.run_tests(TINY, write_tests(tmp_path, f"def test_all(): assert False, '{output}'\n"))
    assert figures["failed"] == 1
    assert figures["failures"] == ["test_all: FAILED tests/cases.py::test_a - assert 1"]


def test_a_missing_package_is_a_failure_and_hides_no_other_result(tmp_path):
    missing = "import no_such_package.part\n"
    with pytest.raises(RuntimeError, match="these tests must run; not installed: no_such_package"):
        checks.run_tests(TINY, write_tests(tmp_path, missing))
    figures = checks.run_tests(TINY, write_tests(tmp_path, f"def test_right(): pass\ndef test_other():\n    {missing}"))
    assert (figures["passed"], figures["failed"]) == (1, 1)


@pytest.mark.parametrize("package", ["pytest", "pytest_timeout"])
def test_without_pytest_or_its_timeout_the_tests_fail_but_for_those_that_need_more_packages(monkeypatch, package):
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(checks, "_run", lambda command: pytest.fail("it ran"))
    with pytest.raises(RuntimeError, match=f"these tests must run; not installed: {package}$"):
        checks.run_tests(TINY, "tests/divergence/test_triton.py")
    with pytest.raises(NotMeasuredError, match=f"not installed: {package}$"):
        checks.run_tests(TINY, "tests/trainer/test_no_waiting.py")


def test_that_all_tests_were_skipped_on_a_gpu_is_a_failure_with_its_reason(tmp_path):
    file = write_tests(tmp_path, "@pytest.mark.skip(reason='no device')\ndef test_skipped(): pass\n")
    with pytest.raises(RuntimeError, match="these tests must run; all of its tests were skipped: no device"):
        checks.run_tests(FULL, file)


def test_tests_of_a_gpu_need_no_conftest_but_for_those_named(tmp_path):
    (tmp_path / "conftest.py").write_text("import no_such_package\n")
    assert checks.run_tests(TINY, write_tests(tmp_path, "def test_right(): pass\n"))["passed"] == 1


def test_a_file_without_a_test_of_the_gpu_is_a_failure(tmp_path):
    file = tmp_path / "test_nothing.py"
    file.write_text("def test_unmarked(): pass\n")
    with pytest.raises(RuntimeError, match="pytest ended with 5"):
        checks.run_tests(TINY, str(file))


def test_steps_of_the_trainer_need_its_packages_before_any_model_is_built(monkeypatch):
    monkeypatch.setattr(steps, "TRAINER_NEEDS", ("no_such_package",))
    monkeypatch.setattr(steps, "random_model", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(NotMeasuredError, match="not installed: no_such_package"):
        steps.measure_step(TINY, "7B", "off", "full", "trainer")


@pytest.mark.parametrize("is_failing", [False, True])
def test_the_result_of_a_test_file_is_read_from_its_report(tmp_path, is_failing):
    file = tmp_path / "test_something.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n@pytest.mark.skip\ndef test_skipped(): pass\n"
        f"def test_other(): assert 1 == {2 if is_failing else 1}\n"
    )
    figures = checks.run_tests(TINY, str(file))
    assert (figures["passed"], figures["failed"], figures["skipped"]) == ((1, 1, 1) if is_failing else (2, 0, 1))
    assert any("test_other: assert 1 == 2" in failure for failure in figures["failures"]) == is_failing


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_what_a_sanitizer_finds_is_reported(tmp_path, monkeypatch, tool):
    """A program in the sanitizer's place, which finds what its second argument says."""
    found = "Invalid __global__ write of size 4 bytes" if tool == "memcheck" else ""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho '========= {found}'\n"
        'case "$*" in "--tool memcheck --error-exitcode 99 --report-api-errors no "*exercise*cuda*) exit 99;; '
        "*exercise*cuda*) exit 0;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    expected = {"failed": 1, "found": [found]} if found else {"failed": 0, "found": []}
    assert checks.sanitize(FULL, tool) == expected


def test_a_sanitizer_that_takes_too_long_is_no_failure(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/started\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(checks, "_LONGEST_SANITIZER", 1)
    with pytest.raises(NotMeasuredError, match="did not finish in 1 s"):
        checks.sanitize(FULL, "racecheck")
    started = Path(tmp_path / "started").read_text().strip()
    assert not Path(f"/proc/{started}/cmdline").exists() or not Path(f"/proc/{started}/cmdline").read_bytes()


def test_a_machine_without_the_sanitizer_is_told_so(monkeypatch):
    monkeypatch.setattr(checks, "_SANITIZERS", ("no-such-sanitizer",))
    with pytest.raises(NotMeasuredError, match="compute-sanitizer is not installed"):
        checks.sanitize(FULL, "memcheck")


def test_a_card_is_described_with_its_driver_and_architecture(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.04\necho 580.159.04\n")  # one line for each card
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = SimpleNamespace(name="H100", total_memory=2**36, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("benchmarks.gpu.card.runs_in_triton", lambda logits: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    about = description(FULL)
    assert (about["card"], about["driver"], about["capability"]) == ("H100", "580.159.04", "sm_90")
    assert about["l2_bytes"] is None
    assert about["has_kernels"] is True
    assert json.dumps(about)


def test_plain_logits_and_hidden_states_give_the_same_loss_with_and_without_adapters():
    sizes = steps.Sizes.of(TINY, "off")
    for tuned in (False, True):
        torch.manual_seed(0)
        student = random_model(TINY, "0.5B", torch.float32)
        # Weights of this size tell a loss from its neighbour's: those of a new model predict almost uniformly.
        teacher = random_model(TINY, "7B", torch.float32)
        for model in (student, teacher):
            model.get_output_embeddings().weight.data.normal_()
        if tuned:
            student = steps.get_peft_model(student, steps.LoraConfig(**steps.LORA))
        found = {}
        for name, of_batch in steps.losses().items():
            loop = steps.Loop(TINY, sizes, "off", student, teacher, of_batch)
            batch = TokenBatch.from_inputs(steps.random_rows(TINY, sizes.B, sizes.L, sizes.prompt))
            found[name] = of_batch(loop.models, batch, loop.clock).item() / batch.n_scored
        assert found["ours"] > 0.05
        assert found["ours"] == pytest.approx(found["logits"], rel=2e-2)  # autocast rounds the logits to bfloat16


def test_random_models_keep_the_relations_of_the_real_ones():
    heads = {size: random_model(TINY, size, torch.bfloat16).get_output_embeddings().weight for size in SIZES}
    assert heads["0.5B"].shape[0] == heads["1.5B"].shape[0] < heads["7B"].shape[0]
    assert heads["0.5B"].shape[1] < heads["1.5B"].shape[1] < heads["7B"].shape[1]
    assert vocabulary_size(TINY) < heads["0.5B"].shape[0]
    assert vocabulary_size(FULL) < SIZES["0.5B"]["vocab_size"]

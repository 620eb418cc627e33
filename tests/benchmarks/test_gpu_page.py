"""The tables of results, and the section of docs/performance.md."""

import copy
import json

import pytest

from benchmarks.gpu.page import BEGIN, END, PAGE, keep, section, write_page

ABOUT = {
    "card": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "cuda": "13.0",
    "commit": "abc",
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "trl": None},
    "has_kernels": True,
}


def results(stage, *cells, **head):
    """Cells are (part, key, status or figures)."""
    outcomes = []
    for part, key, found in cells:
        outcome = {"status": "measured", "figures": found} if isinstance(found, dict) else {"status": found}
        outcomes.append({"part": part, "key": key, **outcome})
    about = {"stage": stage, "device": "cuda", "is_small": False, "date": "2026-12-01T10:00:00+00:00", "about": ABOUT}
    return {**about, **head, "cells": outcomes}


def written(folder, *all_results):
    folder.mkdir(exist_ok=True)
    for each in all_results:
        (folder / f"{each['stage']}.json").write_text(json.dumps(each))
    return folder


def time_of(shape, contender, found):
    return "time", {"shape": shape, "contender": contender}, found


TIME = {"seconds": 0.07, "floor_seconds": 0.058, "ratio": 1.207, "added_bytes": 5.25e9}
STEP = {"seconds": 1.5, "rollout": 0.0, "teacher": 0.5, "student": 0.8, "rest": 0.2, "peak_bytes": 30e9}


def step_of(contender, found):
    return "step", {"teacher": "7B", "policy": "off", "tuned": "full", "contender": contender}, found


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_without_results_the_page_says_that_nothing_has_run_on_a_gpu(tmp_path):
    assert section(tmp_path) == "**Not yet run on a GPU.**"


def test_the_page_shows_the_results_that_are_kept():
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0].strip() == section()


def test_the_section_has_figures_goals_and_what_was_not_measured_and_names_card_and_versions(tmp_path):
    loss = results(
        "loss",
        time_of("4096/4096", "ours", TIME),
        time_of("4096/4096", "torch", "out of memory"),
        time_of("4096/4096", "liger", "waiting"),
        ("memory", {"shape": "4096/4096", "student": "float32"}, {**TIME, "workspace_bytes": 2.5e9, "bytes": 2.7e9}),
        ("top-k", {"shape": "4096/4096"}, {"teacher_seconds": 0.02, "seconds": 0.05}),
    )
    text = section(written(tmp_path, loss))
    assert "NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0" in text
    assert "torch 2.11.0, triton 3.6.0;" in text
    assert "2026-12-01, commit abc" in text
    rows = rows_of(text)
    assert ["4096/4096", "ours", "70.0", "58.0", "1.21", "5.25", "≤ 1.2"] in rows
    assert ["4096/4096", "plain torch", "out of memory", "", "", "", ""] in rows
    assert ["4096/4096", "Liger chunked JSD, compiled", "not run", "", "", "", ""] in rows
    assert ["4096/4096 × float32", "70.0", "1.21", "2.50", "2.70", "+8%"] in rows
    assert ["4096/4096", "20.0", "50.0"] in rows
    assert "Not yet run on a GPU: `checks`, `steps`." in text


def test_steps_are_compared_with_those_of_plain_logits_if_these_could_be_measured(tmp_path):
    plain = {**STEP, "seconds": 3.0, "peak_bytes": 60e9}
    both = results("steps", step_of("ours", STEP), step_of("logits", plain))
    rows = rows_of(section(written(tmp_path, both)))
    assert rows[2][:7] == ["ours, plain loop", "7B", "off", "full", "1.500", "0.000", "0.500"]
    assert rows[2][-3:] == ["30.00", "0.50", "0.50"]
    alone = results("steps", step_of("ours", STEP), step_of("logits", "out of memory"))
    rows = rows_of(section(written(tmp_path, alone)))
    assert rows[2][-3:] == ["30.00", "", ""]


def test_a_failed_test_and_a_found_error_are_shown(tmp_path):
    checks = results(
        "checks",
        ("copy", {}, {"bytes_per_second": 3.01e12}),
        ("product", {"M": 8, "K": 8, "N": 8}, {"operations_per_second": 7.98e14}),
        ("tests", {"file": "tests/x.py"}, {"passed": 3, "failed": 1, "skipped": 0, "failures": ["y"]}),
        ("sanitizer", {"tool": "memcheck"}, {"failed": 1, "found": ["Invalid __global__ write"]}),
    )
    rows = rows_of(section(written(tmp_path, checks)))
    assert ["copy, read and written", "3.01 TB/s"] in rows
    assert ["product in bf16, 8 × 8 × 8", "798 TFLOP/s"] in rows
    assert ["tests/x.py", "3", "1", "0"] in rows
    assert ["memcheck", "Invalid __global__ write"] in rows


def test_writing_the_page_replaces_only_the_section_and_can_be_repeated(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    kept = written(tmp_path / "kept", results("loss", time_of("4096/4096", "ours", TIME)))
    write_page(page, kept)
    once = page.read_text()
    assert once.startswith(f"before\n\n{BEGIN}\n\n**`loss`**")
    assert once.endswith(f"{END}\n\nafter\n")
    assert "old" not in once
    write_page(page, kept)
    assert page.read_text() == once


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"is_small": True}])
def test_results_that_only_tried_the_code_are_not_kept(tmp_path, change):
    whole = results("loss", time_of("4096/4096", "ours", TIME))
    tried = {**copy.deepcopy(whole), "stage": "steps", **change}
    folder = written(tmp_path / "new", whole, tried)
    with pytest.raises(SystemExit, match=r"steps\.json was made to try the code"):
        keep(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_results_without_the_kernels_are_not_kept(tmp_path):
    folder = written(tmp_path / "new", results("loss", about={**ABOUT, "has_kernels": False}))
    with pytest.raises(SystemExit, match=r"loss\.json was measured without Triton's kernels"):
        keep(folder, tmp_path / "kept")


def test_results_of_a_gpu_are_kept_beside_those_of_other_stages(tmp_path):
    kept = written(tmp_path / "kept", results("checks"))
    keep(written(tmp_path / "new", results("loss")), kept)
    assert sorted(file.name for file in kept.iterdir()) == ["checks.json", "loss.json"]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="must hold results of a stage"):
        keep(tmp_path)

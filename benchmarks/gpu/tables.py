"""The tables of each stage, from its results. A cell without figures has its outcome in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.cells import MEASURED, SKIPPED, WAITING
from benchmarks.gpu.loss import SHAPES, TOP_K
from benchmarks.loss import CONTENDERS

Results = Mapping[str, Any]
Outcome = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table; the cells of its rows are text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of_checks(results: Results) -> list[Table]:
    """Return the card's own figures, and what tests and sanitizer found."""
    figures = [
        *_rows(results, "copy", lambda f: [f"{f['bytes_per_second'] / 1e12:.2f} TB/s"], "copy, read and written"),
        *_rows(results, "product", lambda f: [f"{f['operations_per_second'] / 1e12:.0f} TFLOP/s"], "product in bf16,"),
    ]
    tests = _rows(results, "tests", lambda f: [str(f[name]) for name in ("passed", "failed", "skipped")], width=3)
    sanitizer = _rows(results, "sanitizer", lambda f: ["; ".join(f["found"][:2]) if f["failed"] else "no errors"])
    return _with_rows(
        Table("The card", ["", "rate"], figures),
        Table("Tests marked `gpu`", ["file", "passed", "failed", "skipped"], tests),
        Table("Memory errors, by compute-sanitizer", ["tool", "found"], sanitizer),
    )


def tables_of_loss(results: Results) -> list[Table]:
    """Return times beside the floor and the goals, memory, errors, and the sweeps."""
    times = []
    for outcome in _outcomes(results, "time"):
        shape, contender = outcome["key"]["shape"], outcome["key"]["contender"]
        goal = f"≤ {SHAPES[shape].goal}" if contender == "ours" else ""
        cells = _cells(outcome, _time_cells, 4)
        times.append([shape, CONTENDERS[contender].title, *cells, goal])
    memory = _rows(
        results,
        "memory",
        lambda f: [
            f"{1e3 * f['seconds']:.1f}",
            f"{f['ratio']:.2f}",
            _gb(f["workspace_bytes"]),
            _gb(f["bytes"]),
            f"{_excess(f):+.0%}",
        ],
        width=5,
    )
    return _with_rows(
        Table(
            "Forward and backward of the divergence, in bf16, β = 0.5; the floor is the four products, unblocked",
            ["H student/teacher", "", "ms", "floor, ms", "× floor", "GB added", "goal"],
            times,
        ),
        Table(
            "The same with a given workspace, and memory beside weights, inputs and gradients in float32: the goal is "
            "at most 10 % above the workspace, to which a student in float32 adds a copy of its head in bf16",
            ["H student/teacher × student", "ms", "× floor", "workspace GB", "taken GB", "above it"],
            memory,
        ),
        Table(
            f"Top {TOP_K} tokens of the teacher, from its hidden states; the divergence on them, forward and backward",
            ["H student/teacher", "teacher, ms", "divergence, ms"],
            _rows(
                results, "top-k", lambda f: [f"{1e3 * f[name]:.1f}" for name in ("teacher_seconds", "seconds")], width=2
            ),
        ),
        Table(
            "Error of the gradient of bf16 inputs from float64, by the gap between the logits: hidden states, head",
            ["H student/teacher, contender", *_gaps(results)],
            _rows(results, "error", _error_cells, width=max(1, len(_gaps(results)))),
        ),
        Table(
            "Tokens per tile",
            ["H student/teacher, tokens", "ms"],
            _rows(results, "block", lambda f: [f"{1e3 * f['seconds']:.1f}"]),
        ),
        Table(
            "The kernel alone, on 2048 rows; TB/s as if it read and wrote each number once",
            ["divergence, tile, warps", "ms", "TB/s"],
            _rows(
                results,
                "kernel",
                lambda f: [f"{1e3 * f['seconds']:.2f}", f"{f['bytes_per_second'] / 1e12:.2f}"],
                width=2,
            ),
        ),
    )


def tables_of_steps(results: Results) -> list[Table]:
    """Return the seconds and bytes of steps, and their ratio to those with plain logits."""
    outcomes = list(_outcomes(results, "step"))
    plain = {_setting(outcome): outcome for outcome in outcomes if outcome["key"]["contender"] == "logits"}
    rows = []
    for outcome in outcomes:
        key, other = outcome["key"], plain.get(_setting(outcome), {})
        cells = _cells(outcome, _step_cells, 6)
        ratios = ["", ""]
        if key["contender"] != "logits" and outcome["status"] == other.get("status") == MEASURED:
            own, reference = outcome["figures"], other["figures"]
            ratios = [f"{own[name] / reference[name]:.2f}" for name in ("seconds", "peak_bytes")]
        rows.append([_TITLES[key["contender"]], key["teacher"], key["policy"], key["tuned"], *cells, *ratios])
    parts = ["rollout", "teacher", "student", "rest"]
    header = ["", "teacher", "policy", "tuned", "s per step", *parts, "peak GB", "of plain, s", "of plain, GB"]
    return _with_rows(Table("Steps of a 0.5B student, 8 sequences of 1,024 tokens", header, rows))


STAGES: Mapping[str, Callable[[Results], list[Table]]] = {
    "checks": tables_of_checks,
    "loss": tables_of_loss,
    "steps": tables_of_steps,
}

_TITLES = {"ours": "ours, plain loop", "logits": "plain logits, plain loop", "trainer": "GKDTrainer"}


def _outcomes(results: Results, part: str) -> Iterator[Outcome]:
    return (outcome for outcome in results["cells"] if outcome["part"] == part)


def _rows(
    results: Results, part: str, cells_of: Callable[[Mapping[str, Any]], list[str]], prefix: str = "", width: int = 1
) -> list[list[str]]:
    """Return a row for each cell of a part: its key, then `width` cells from its figures."""
    rows = []
    for outcome in _outcomes(results, part):
        name = " ".join(filter(None, [prefix, " × ".join(map(str, outcome["key"].values()))]))
        rows.append([name, *_cells(outcome, cells_of, width)])
    return rows


def _cells(outcome: Outcome, cells_of: Callable[[Mapping[str, Any]], list[str]], width: int) -> list[str]:
    if outcome["status"] == MEASURED:
        return cells_of(outcome["figures"])
    text = outcome["status"]
    if text == WAITING:
        text = "not run"
    elif text != SKIPPED and "why" in outcome:
        text = f"{text}: {outcome['why']}"
    return [text, *[""] * (width - 1)]


def _time_cells(figures: Mapping[str, Any]) -> list[str]:
    milliseconds = [f"{1e3 * figures[name]:.1f}" for name in ("seconds", "floor_seconds")]
    return [*milliseconds, f"{figures['ratio']:.2f}", _gb(figures["added_bytes"])]


def _error_cells(figures: Mapping[str, Any]) -> list[str]:
    return [f"{errors['hidden']:.2%}, {errors['head']:.2%}" for errors in figures["errors"].values()]


def _step_cells(figures: Mapping[str, Any]) -> list[str]:
    seconds = [f"{figures[name]:.3f}" for name in ("seconds", "rollout", "teacher", "student", "rest")]
    return [*seconds, _gb(figures["peak_bytes"])]


def _gaps(results: Results) -> list[str]:
    measured = [outcome for outcome in _outcomes(results, "error") if outcome["status"] == MEASURED]
    return list(measured[0]["figures"]["errors"]) if measured else ["error"]


def _setting(outcome: Outcome) -> tuple[str, ...]:
    return tuple(outcome["key"][name] for name in ("teacher", "policy", "tuned"))


def _excess(figures: Mapping[str, Any]) -> float:
    return float(figures["bytes"] / figures["workspace_bytes"] - 1)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _with_rows(*tables: Table) -> list[Table]:
    return [table for table in tables if table.rows]

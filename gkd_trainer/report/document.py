"""The report of one or several runs, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from gkd_trainer.report.figures import charts, divergence_unit, stage_table, starts
from gkd_trainer.report.page import chart_values, map_values, rendered
from gkd_trainer.report.run import Run

MAX_MAP_BYTES = 600_000
"""How much of a page its completions may take: with it and MAX_PAGE_POINTS, a page stays below a megabyte."""


def run_page(runs: Sequence[Run]) -> str:
    """Return the report of runs as HTML: several runs are stages of one student, in order."""
    drawn = chart_values(charts(runs))
    columns, rows = stage_table(runs)
    return rendered(
        "report.html",
        " → ".join(run.name for run in runs),
        facts=_facts(runs[-1]),
        notes=[note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes],
        stages={"columns": columns, "rows": rows},
        data={"charts": drawn.pop("chart_data"), "entries": _entries(runs), "unit": divergence_unit(runs)},
        **drawn,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = []
    if run.facts is not None:
        facts = [("student", run.facts.student), ("teacher", run.facts.teacher)]
        options = run.facts.options
        last = options.get("lmbda_end") if options.get("lmbda_schedule") == "linear" else None
        facts.append(("λ", f"{options.get('lmbda')}" + ("" if last is None else f" to {last}")))
        divergence = str(options.get("divergence"))
        facts.append(("divergence", f"JSD, β {options.get('beta')}" if divergence == "jsd" else divergence))
    steps = f"{run.last_step}" + ("" if run.max_steps in (None, run.last_step) else f" of {run.max_steps}")
    return [*facts, ("steps", steps)]


def _entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the completions of as many log entries as fit, spread evenly over the runs."""
    found = []
    for start, run in zip(starts(runs), runs, strict=True):
        for record in run.records:
            if record.samples:
                step = start + (record.sampled_step or record.step)
                captions = [_caption(sample.is_on_policy, step) for sample in record.samples]
                maps = [map_values(*each) for each in zip(record.samples, captions, strict=True)]
                found.append({"step": step, "maps": maps})
    sizes = [len(_json(entry)) for entry in found]
    if not sizes or sum(sizes) <= MAX_MAP_BYTES:
        return found
    # As many as fit at the mean size, then fewer until they do.
    for count in range(max(1, MAX_MAP_BYTES * len(found) // sum(sizes)), 0, -1):
        indices = sorted({round(index * (len(found) - 1) / max(1, count - 1)) for index in range(count)})
        if sum(sizes[index] for index in indices) <= MAX_MAP_BYTES:
            return [found[index] for index in indices]
    return _fitting(found[-1])


def _fitting(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry with only as many of its maps as fit."""
    maps: list[dict[str, Any]] = []
    for each in entry["maps"]:
        if len(_json([*maps, each])) > MAX_MAP_BYTES:
            break
        maps.append(each)
    return [{**entry, "maps": maps}] if maps else []


def _json(value: Any) -> str:
    """Return a value as the page has it: escapes may take more room than the text."""
    return htmlsafe_json_dumps(value, separators=(",", ":"))


def _caption(is_on_policy: bool, step: int) -> str:
    return f"{'On-policy: the student wrote it' if is_on_policy else 'Off-policy'}, step {step}"

"""The report of one or several runs, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from gkd_trainer.report.figures import charts, divergence_unit, stage_table, starts
from gkd_trainer.report.page import chart_values, map_values, rendered
from gkd_trainer.report.run import Run

MAX_MAP_BYTES = 4_000_000
"""How much of a page its completions may take: with it and MAX_PAGE_POINTS, a page stays below 5 MB."""

_ENOUGH_ENTRIES = 20
"""If fewer log entries fit, each is shown with fewer completions."""

_IN_MODE = {
    "matched": "{} over matched tokens",
    "next_byte": "{} over the next byte",
    "uld": "ULD",
    "gold": "{} and ULD (GOLD)",
}
"""The divergence from a teacher with another tokenizer, by the mode in which it is compared."""


def run_page(runs: Sequence[Run]) -> str:
    """Return the report of runs as HTML: several runs are stages of one student, in order."""
    drawn = chart_values(charts(runs))
    columns, rows = stage_table(runs)
    entries = _entries(runs)
    shown = _fitting(entries)
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    return rendered(
        "report.html",
        " → ".join(run.name for run in runs),
        facts=_facts(runs[-1]),
        notes=[*notes, *_left_out(entries, shown)],
        stages={"columns": columns, "rows": rows},
        data={"charts": drawn.pop("chart_data"), "entries": shown, "unit": divergence_unit(runs)},
        **drawn,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = []
    if run.facts is not None:
        facts = [("student", run.facts.student), ("teacher", run.facts.teacher)]
        options = run.facts.options
        last = options.get("lmbda_end") if options.get("lmbda_schedule") == "linear" else None
        facts.append(("λ", f"{options.get('lmbda')}" + ("" if last is None else f" to {last}")))
        facts.append(("divergence", _divergence(options)))
    steps = f"{run.last_step}" + ("" if run.max_steps in (None, run.last_step) else f" of {run.max_steps}")
    return [*facts, ("steps", steps)]


def _divergence(options: Mapping[str, Any]) -> str:
    name = str(options.get("divergence"))
    name = f"JSD, β {options.get('beta')}" if name == "jsd" else name
    modes = options.get("vocabulary_modes") or [None]
    return "; ".join(_IN_MODE.get(mode, "{}").format(name) for mode in modes)


def _entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the completions of all log entries that have some."""
    found = []
    for start, run in zip(starts(runs), runs, strict=True):
        for record in run.records:
            if record.samples:
                step = start + (record.sampled_step or record.step)
                captions = [_caption(sample.is_on_policy, step) for sample in record.samples]
                maps = [map_values(*each) for each in zip(record.samples, captions, strict=True)]
                found.append({"step": step, "maps": maps})
    return found


def _fitting(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many entries as fit, spread evenly, with fewer maps in each if few fit."""
    sizes = [[len(_json(each)) for each in entry["maps"]] for entry in entries]
    indices: list[int] = []
    for n_maps in range(max(map(len, sizes), default=0), 0, -1):
        indices = _spread([sum(of_maps[:n_maps]) for of_maps in sizes])
        if len(indices) >= min(len(entries), _ENOUGH_ENTRIES):
            break
    return [{**entries[index], "maps": entries[index]["maps"][:n_maps]} for index in indices]


def _spread(sizes: Sequence[int]) -> list[int]:
    """Return the indices of as many entries as fit, spread evenly from the first to the last; of one, the last."""
    last = len(sizes) - 1
    # As many as fit at the mean size, then fewer until they do.
    most = min(len(sizes), max(2, MAX_MAP_BYTES * len(sizes) // sum(sizes)))
    for count in range(most, 0, -1):
        indices = sorted({last - round(index * last / max(1, count - 1)) for index in range(count)})
        if sum(sizes[index] for index in indices) <= MAX_MAP_BYTES:
            return indices
    return []


def _left_out(entries: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note on the completions that did not fit, if there are any."""
    of_entries = "" if len(shown) == len(entries) else f" of {len(shown)} of {len(entries)} log entries"
    most, n_maps = (max((len(entry["maps"]) for entry in each), default=0) for each in (entries, shown))
    of_maps = "" if n_maps in (0, most) else f", at most {n_maps} of {most} per entry"
    if not of_entries and not of_maps:
        return []
    return [f"Completions{of_entries} are shown{of_maps}: all of them would make this page too large."]


def _json(value: Any) -> str:
    """Return a value as the page has it: escapes may take more room than the text."""
    return htmlsafe_json_dumps(value, separators=(",", ":"))


def _caption(is_on_policy: bool, step: int) -> str:
    return f"{'On-policy (written by the student)' if is_on_policy else 'Off-policy'}, step {step}"

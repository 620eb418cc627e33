"""Self-contained HTML files: every text escaped, one style and one script inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gkd_trainer import __version__
from gkd_trainer.report.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, drawn, places_by_x
from gkd_trainer.report.figures import Chart, shortened
from gkd_trainer.report.pieces import readable
from gkd_trainer.report.token_map import NUMBERS, RANKS, TokenMap

MAX_POINTS = 400
"""How many points of a curve a page draws at most: it has no more pixels for them."""

MAX_PAGE_POINTS = 5000
"""How many points the curves of a page have together at most: they take some 60 bytes each."""


def rendered(template: str, title: str, **values: Any) -> str:
    """Return a page: a template of `templates`, in which all values are escaped."""
    environment = Environment(
        loader=PackageLoader("gkd_trainer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = readable
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    sources = {name: _source(name) for name in ("page.css", "page.js")}
    hashes = {name: _hash(source) for name, source in sources.items()}
    return environment.get_template(template).render(
        title=title,
        version=__version__,
        style=Markup(sources["page.css"]),
        script=Markup(sources["page.js"]),
        style_hash=hashes["page.css"],
        script_hash=hashes["page.js"],
        **values,
    )


def chart_values(charts: Sequence[Chart]) -> dict[str, Any]:
    """Return what the template of charts needs."""
    curves = sum(len(chart.series) for chart in charts)
    max_points = min(MAX_POINTS, MAX_PAGE_POINTS // max(1, curves))
    drawings = [drawn(shortened(chart, max_points)) for chart in charts]
    return {
        "drawings": drawings,
        "frame": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "chart_data": {drawing.chart.key: places_by_x(drawing) for drawing in drawings},
    }


def map_values(token_map: TokenMap, caption: str) -> dict[str, Any]:
    """Return a map as the script reads it; `caption` says what it is."""
    return {
        "caption": readable(caption),
        "prompt": readable(token_map.prompt),
        "isCut": token_map.is_cut,
        "tokens": [
            [readable(text), *numbers, _tops(student_top), _tops(teacher_top), student_rank, teacher_rank]
            for text, *numbers, student_top, teacher_top, student_rank, teacher_rank in zip(
                token_map.text,
                *(getattr(token_map, name) for name in NUMBERS),
                token_map.student_top,
                token_map.teacher_top,
                *(getattr(token_map, name) for name in RANKS),
                strict=True,
            )
        ],
    }


def _tops(top: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(readable(text), p) for text, p in top]


def _source(name: str) -> str:
    return (files("gkd_trainer.report") / "templates" / name).read_text(encoding="utf-8").strip()


def _hash(source: str) -> str:
    # The page's policy names what may run: a script that got into it past the escapes would not.
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

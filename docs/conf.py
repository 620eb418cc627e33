"""The site: `make docs`.

The sources are the repository's own pages, which GitHub shows too: so the source directory is the root, links between
pages are those of the repository, and docs/index.md, a page of links, is also the table of contents.
"""

import inspect
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "gkd_trainer"
author = "the contributors"
copyright = "the contributors; Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/notebooks/*.ipynb"]
# Folders are pruned only by what is excluded: nothing else keeps Sphinx out of .venv.
exclude_patterns = [".*", "build", "benchmarks", "experiments", "gkd_trainer", "tests", "**/.ipynb_checkpoints"]

# Pages. Anchors of headings are GitHub's.
myst_heading_anchors = 4
# Notebooks are shown as they were saved: nbmake executes them.
nb_execution_mode = "off"
# A widget, such as a progress bar, would load its scripts from another host: its text is shown instead.
nb_ipywidgets_js: dict[str, object] = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

# The reference. In docstrings, `x` is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
# -n wants a target for every name. Those of other projects are on hosts that a build should not need. A path of ours
# with more than two parts comes from an annotation, and names what a folder does not export.
nitpick_ignore_regex = [(r"py:.*", r"(?!gkd_trainer\b).*"), (r"py:class", r"gkd_trainer(\.\w+){3,}")]

html_theme = "furo"
html_title = "gkd_trainer"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "to_index.html"}
html_copy_source = False
html_show_sphinx = False

# `make docs EXTERNAL=1`.
linkcheck_timeout = 20
linkcheck_anchors = False
linkcheck_ignore = [r"http://127\.0\.0\.1"]

NOTEBOOKS = "examples/notebooks/"
# The modules of exported names, as the reference lists them.
ORDER = ["trainer", "config", "teachers", "rollouts", "divergence", "errors"]


def toctrees(index: str, pages: set[str]) -> str:
    """Return a toctree for each of the index's lists of links, captioned by its heading.

    Notebooks follow the list "Examples", and pages that no list has come last, so that a new page is never lost.

    Args:
        index: The text of docs/index.md.
        pages: The names of all pages, without suffix, relative to the root.
    """
    sections: dict[str, dict[str, str]] = {}
    for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", index, re.MULTILINE | re.DOTALL):
        links = re.findall(r"^- \[(.*?)\]\((?!https?:)(.*?)\)", body, re.MULTILINE)
        sections[heading] = {_page(f"docs/{link}"): f"{title} </{_page(f'docs/{link}')}>" for title, link in links}
    for page in sorted(pages - {"docs/index"}.union(*sections.values())):
        # Those of the reference are in the toctree of docs/api/index.rst.
        if not page.startswith("docs/api/"):
            sections.setdefault("Examples" if page.startswith(NOTEBOOKS) else "More", {})[page] = f"/{page}"
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *entries.values(), "```", ""])
        for heading, entries in sections.items()
        if entries
    )


def _page(path: str) -> str:
    """Return the name of a page from its path: without `..` and suffix."""
    return str(PurePosixPath(posixpath.normpath(path)).with_suffix(""))


def names() -> str:
    """Return the names that the package exports, by module, with their first lines and links to the reference."""
    import gkd_trainer

    modules: dict[str, list[str]] = {}
    for name in sorted(gkd_trainer.__all__):
        modules.setdefault(gkd_trainer._MODULES[name], []).append(name)
    lines = []
    for module, exported in sorted(modules.items(), key=lambda item: [*ORDER, item[0]].index(item[0])):
        lines += ["", f"``gkd_trainer.{module}``", ""]
        for name in exported:
            summary = inspect.getdoc(getattr(gkd_trainer, name)).split("\n")[0]
            lines.append(f"- :py:obj:`{name} <gkd_trainer.{module}.{name}>`: {summary}")
    return "\n".join([*lines, ""])


def extend(app, page, content):
    """Append the table of contents to the index, and the package's names to that of the reference."""
    if page == root_doc:
        content[0] += "\n" + toctrees(content[0], set(app.env.found_docs))
    if page == "docs/api/index":
        content[0] += names()


def setup(app):
    """Connect what Sphinx calls."""
    app.connect("source-read", extend)

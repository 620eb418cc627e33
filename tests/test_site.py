"""The site's table of contents, and the check of a built site; `make docs` builds it, with warnings as errors."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs" / "index.md").read_text()

toctrees = runpy.run_path(str(ROOT / "docs" / "conf.py"))["toctrees"]
problems = runpy.run_path(str(ROOT / "docs" / "check_site.py"))["problems"]


def captions(text):
    """The pages of each toctree, by its caption."""
    blocks = re.findall(r"^```\{toctree\}\n:hidden:\n:caption: (.*?)\n\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return {caption: entries.split("\n")[:-1] for caption, entries in blocks}


def test_the_index_lists_every_page_of_the_documentation():
    listed = re.findall(r"^- \[.*?\]\((.*?)\)", INDEX, re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(listed)


def test_a_list_of_links_becomes_a_toctree_with_its_heading_as_caption():
    index = "# Title\n\n## Start\n\n- [Begin](begin.md): here\n- [All](../README.md)\n- [Far](https://example.org)\n"
    found = captions(toctrees(index, {"docs/index", "docs/begin", "README"}))
    assert found == {"Start": ["Begin </docs/begin>", "All </README>"]}


def test_notebooks_join_the_examples_and_pages_that_no_list_has_come_last():
    index = "## Examples\n\n- [Scripts](examples.md)\n"
    pages = {"docs/index", "docs/examples", "docs/new", "docs/api/index", "docs/api/errors", "examples/notebooks/start"}
    assert captions(toctrees(index, pages)) == {
        "Examples": ["Scripts </docs/examples>", "/examples/notebooks/start"],
        "More": ["/docs/new"],
    }


@pytest.fixture
def site(tmp_path):
    (tmp_path / "style.css").write_text('a { background: url("data:image/svg+xml,x"); }')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.html").write_text('<h2 id="there">There</h2><a href="#there">up</a>')
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="style.css?v=1"><a href="folder/other.html#there">x</a>'
        '<p>url(https://example.org/x)</p><form action="https://example.org/form"></form>'
        '<img srcset="style.css 1x, style.css 2x, " style="background: url(data:image/svg+xml,x)">'
        '<a href="https://example.org/elsewhere">far</a><link rel="canonical" href="https://example.org/page.html">'
    )
    return tmp_path


def test_a_site_whose_links_hold_has_no_problems(site):
    assert list(problems(site)) == []


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="gone.html">x</a>', "bad.html links to gone.html, which does not exist"),
        ('<img src="gone.png">', "bad.html links to gone.png, which does not exist"),
        ('<a href="page.html#gone">x</a>', "bad.html links to page.html#gone, a page without that anchor"),
        ('<a href="#gone">x</a>', "bad.html links to #gone, a page without that anchor"),
        ('<script src="https://cdn.example.org/a.js"></script>', "bad.html loads https://cdn.example.org/a.js"),
        ('<script src="//cdn.example.org/a.js"></script>', "bad.html loads //cdn.example.org/a.js"),
        ('<link rel="stylesheet" href="https://fonts.example.org/f">', "bad.html loads https://fonts.example.org/f"),
        ('<img src="https://example.org/pixel.gif">', "bad.html loads https://example.org/pixel.gif"),
        ('<img srcset="page.html 1x, gone.png 2x">', "bad.html links to gone.png, which does not exist"),
        *(
            (html, "bad.html loads https://example.org/x")
            for html in (
                '<img srcset="page.html 1x, https://example.org/x 2x">',
                '<img srcset="page.html 1x,https://example.org/x 2x">',
                '<source srcset="https://example.org/x">',
                '<link rel="preload" imagesrcset="https://example.org/x 2x">',
                '<link rel="STYLESHEET" href="https://example.org/x">',
                '<video src="https://example.org/x"></video>',
                '<video poster="https://example.org/x"></video>',
                '<audio src="https://example.org/x"></audio>',
                '<track src="https://example.org/x">',
                '<object data="https://example.org/x"></object>',
                '<embed src="https://example.org/x">',
                '<input type="image" src="https://example.org/x">',
                '<svg><image href="https://example.org/x"/></svg>',
                '<svg><use xlink:href="https://example.org/x"/></svg>',
                "<style>@import url(https://example.org/x);</style>",
                "<style>@import 'https://example.org/x';</style>",
                "<style>a { background: url( 'https://example.org/x' ) }</style>",
                '<div style="background: url(https://example.org/x)"></div>',
                "<div style=\"background: URL('https://example.org/x')\"></div>",
            )
        ),
    ],
)
def test_a_dead_link_and_a_file_from_another_host_are_found(site, html, problem):
    (site / "bad.html").write_text(html)
    assert list(problems(site)) == [problem]


@pytest.mark.parametrize("rule", ["@import 'https://example.org/f.css';", "a { src: url(https://example.org/f.css) }"])
def test_a_style_sheet_that_loads_from_another_host_is_found(site, rule):
    (site / "style.css").write_text(rule)
    assert list(problems(site)) == ["style.css loads https://example.org/f.css"]


def test_a_site_without_pages_is_a_problem(tmp_path):
    assert list(problems(tmp_path)) == [f"{tmp_path} has no pages"]

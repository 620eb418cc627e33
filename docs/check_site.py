"""Check a built site: its local links lead somewhere, and no page loads anything from another host.

python docs/check_site.py build/docs/html
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes whose target a browser fetches by itself. Of <link>, only these relations are fetched.
LOADED = {
    *(
        (tag, "src")
        for tag in ("script", "img", "iframe", "frame", "source", "video", "audio", "track", "embed", "input")
    ),
    *((tag, "srcset") for tag in ("img", "source")),
    *((tag, "href") for tag in ("image", "use", "feimage")),  # of SVG
    ("link", "href"),
    ("link", "imagesrcset"),
    ("video", "poster"),
    ("object", "data"),
}
LISTS = {"srcset", "imagesrcset"}
LOADED_BY_CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?\s*((?:https?:)?//[^\"')\s;]*)", re.IGNORECASE)
FETCHED_RELATIONS = {"stylesheet", "preload", "icon", "modulepreload", "prefetch", "preconnect", "dns-prefetch"}


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self._is_in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        self._is_in_style = tag == "style"
        values = {name.removeprefix("xlink:"): value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self.loads.update(LOADED_BY_CSS.findall(values.get("style", "")))
        relations = set(values.get("rel", "").lower().split())
        for name, value in values.items():
            is_loaded = (tag, name) in LOADED and (tag != "link" or bool(relations & FETCHED_RELATIONS))
            if not is_loaded and name not in ("href", "src"):
                continue
            # A list of images holds each address with its width or density.
            items = re.split(r"(?<=\d[wx]),\s*|,\s+", value) if name in LISTS else [value]
            targets = [item.split()[0] for item in items if item.strip()] if name in LISTS else items
            self.links.update(targets)
            if is_loaded:
                self.loads.update(targets)

    def handle_endtag(self, tag: str) -> None:
        """Note the end of a style sheet."""
        self._is_in_style = self._is_in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        """Note what a style sheet in the page loads."""
        if self._is_in_style:
            self.loads.update(LOADED_BY_CSS.findall(data))


def problems(site: Path) -> Iterator[str]:
    """Yield one line for each link that leads nowhere, and for each file from another host."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in sorted(page.links | page.loads):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.loads and url.scheme != "data":
                    yield f"{name} loads {link}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                yield f"{name} links to {link}, which does not exist"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}, a page without that anchor"
    for path in sorted(site.rglob("*.css")):
        for url in LOADED_BY_CSS.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads {url}"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1])))
    sys.exit("\n".join(found) if found else None)

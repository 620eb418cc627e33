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
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
LOADED_BY_CSS = r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')]*)"
FETCHED_RELATIONS = {"stylesheet", "preload", "icon", "modulepreload", "prefetch", "preconnect", "dns-prefetch"}


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        values = {name: value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        for name in ("href", "src"):
            if name not in values:
                continue
            relations = set(values.get("rel", "").split())
            if (tag, name) in LOADED and (tag != "link" or relations & FETCHED_RELATIONS):
                self.loads.add(values[name])
            self.links.add(values[name])


def problems(site: Path) -> Iterator[str]:
    """Yield one line for each link that leads nowhere, and for each file from another host."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in sorted(page.links):
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
        for url in re.findall(
            r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')]*)", path.read_text(encoding="utf-8")
        ):
            yield f"{path.relative_to(site)} loads {url}"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1])))
    sys.exit("\n".join(found) if found else None)

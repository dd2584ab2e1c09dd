"""Checks a built site: every internal link and picture must lead to an existing file and anchor.

MkDocs checks links in Markdown. This reads the HTML, so it also checks links from docstrings,
generated pages and the theme. `python -m website.links site`.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects the links and anchors of an element."""
        attributes = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := attributes.get(name))}
        self.links |= {value for name in ("href", "src") if (value := attributes.get(name))}


def broken_links(site: Path) -> list[str]:
    """Broken links within the site."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    return [
        f"{path.relative_to(site)} links to {link}"
        for path, page in sorted(pages.items())
        # 404.html is served for any address, so its links start at the root of the host.
        if path.name != "404.html"
        for link in sorted(page.links)
        if is_broken(path, link, pages)
    ]


def is_broken(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Whether a link points to a missing file or anchor."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    anchor = unquote(parts.fragment)
    return bool(anchor) and target in pages and anchor not in pages[target].anchors


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]).resolve())
    sys.exit("\n".join(found) if found else 0)

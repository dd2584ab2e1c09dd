"""Checks a built site: every link and every picture within it leads to a page, and to its anchor.

MkDocs checks what is written in Markdown. This reads the HTML, so it also sees what docstrings,
generated pages and the theme link to. `python -m website.links site`.
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
        """Called for each element."""
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links |= {value for name in ("href", "src") if (value := found.get(name))}


def broken(site: Path) -> list[str]:
    """Broken links within the site."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    return [
        f"{path.relative_to(site)} links to {link}"
        for path, page in sorted(pages.items())
        # It is shown at any address, and links from the root of the host.
        if path.name != "404.html"
        for link in sorted(page.links)
        if leads_nowhere(path, link, pages)
    ]


def leads_nowhere(path: Path, link: str, pages: dict[Path, Page]) -> bool:
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
    found = broken(Path(sys.argv[1]).resolve())
    sys.exit("\n".join(found) if found else 0)

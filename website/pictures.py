"""Draws an adapted weight as boxes: `W[in,out] + s · a[in,r]* b[r,out]*`.

A box is `name[rows,columns]`. A star means that it is trained. A pattern in braces shows which
entries exist: `{diagonal}`, `{blocks}`, `{grid}`, `{rows}`, `{stripes}`. `a[in,r|i,r]` also labels
the axes, next to the rows and above the columns. Everything between boxes is text. The colors are
those of the page, so a picture adapts to light and dark mode.
"""

import re
from collections.abc import Callable
from html import escape
from typing import NamedTuple

# Lengths of sides. Sizes that can differ in a model differ here.
SIDES = {"1": 9, "r": 26, "R": 44, "in": 96, "out": 132, "m": 40, "l": 52, "n": 60, "k": 78}
GAP, HEIGHT, MARGIN, LABEL = 10, 132, 4, 14

BOX = re.compile(
    r"(?P<name>\S+?)\[(?P<rows>\w+),(?P<columns>\w+)(?:\|(?P<row>\w),(?P<column>\w))?\](?:\{(?P<pattern>\w+)\})?(?P<trained>\*?)"
)


class Rectangle(NamedTuple):
    """A part of a box, relative to its upper left corner."""

    x: float
    y: float
    width: float
    height: float


def diagonal(width: float, height: float, n: int) -> list[Rectangle]:
    """The `n` blocks on the diagonal of a rectangle."""
    return [Rectangle(k * width / n, k * height / n, width / n, height / n) for k in range(n)]


def grid(width: float, height: float, n: int) -> list[Rectangle]:
    """All blocks of a grid."""
    w, h = width / n, height / n
    return [Rectangle(i * w + 1, j * h + 1, w - 2, h - 2) for i in range(n) for j in range(n)]


def rows(width: float, height: float, which: list[int], n: int) -> list[Rectangle]:
    """Some rows out of `n`."""
    return [Rectangle(0, k * height / n, width, height / n) for k in which]


PATTERNS: dict[str, Callable[[float, float], list[Rectangle]]] = {
    "diagonal": lambda width, height: diagonal(width, height, 6),
    "blocks": lambda width, height: diagonal(width, height, 3),
    "grid": lambda width, height: grid(width, height, 3),
    "rows": lambda width, height: rows(width, height, [2, 5, 9], 12),
    "stripes": lambda width, height: (
        rows(width, height, [0, 4, 8], 12) + rows(width, height, [2, 6, 10], 12)
    ),
}
WITH_LABEL_ABOVE = {"diagonal", "blocks", "grid", "stripes"}


def svg(notation: str) -> str:
    """The picture as an HTML element."""
    parts: list[str] = []
    x = float(MARGIN)
    kinds: set[str] = set()
    for token in tokens(notation):
        if isinstance(token, str):
            if set("[]{}|*") & set(token):
                raise ValueError(
                    f"{token!r} is not a box: name[rows,columns|row,column]{{pattern}}*"
                )
            width = 9.5 * len(token)
            parts.append(text(x + width / 2, HEIGHT / 2, token, "operator"))
        else:
            x += LABEL if token["row"] else 0
            width = SIDES[token["columns"]]
            kind = "trained" if token["trained"] else "frozen"
            kinds.add("trained" if token["pattern"] == "rows" else kind)
            kinds.add(kind)
            parts.append(box(x, token, kind))
        x += width + GAP
    width = x - GAP + MARGIN
    label = escape(notation.replace("*", ""), quote=True)
    return (
        f'<figure class="weight" markdown="0"><svg viewBox="0 0 {width:g} {HEIGHT + 2 * MARGIN}" '
        f'style="width: {width:g}px" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>{legend(kinds)}</figcaption></figure>"
    )


def tokens(notation: str) -> list[str | dict[str, str]]:
    """The boxes, and the text between them."""
    parsed: list[str | dict[str, str]] = []
    end = 0
    for match in BOX.finditer(notation):
        parsed += notation[end : match.start()].split()
        parsed.append({key: value or "" for key, value in match.groupdict().items()})
        end = match.end()
    return parsed + notation[end:].split()


def box(x: float, token: dict[str, str], kind: str) -> str:
    """One array, vertically centered."""
    width, height = SIDES[token["columns"]], SIDES[token["rows"]]
    y = MARGIN + (HEIGHT - height) / 2
    pattern = PATTERNS.get(token["pattern"])
    shape = f'x="{x:g}" y="{y:g}" width="{width}" height="{height}"'
    outline = f'<rect class="{"outline" if pattern and kind == "trained" else kind}" {shape}/>'
    inside = "".join(
        f'<rect class="trained" x="{x + r.x:g}" y="{y + r.y:g}" '
        f'width="{r.width:g}" height="{r.height:g}"/>'
        for r in (pattern(width, height) if pattern else [])
    )
    # A label is written above the box if it does not fit, or if it would cover entries.
    above = width < 10 * len(token["name"]) or height < 20 or token["pattern"] in WITH_LABEL_ABOVE
    at = y - 9 if above else y + height / 2
    role = "name" if above else "name inside"
    labels = ""
    if token["row"]:
        labels += text(x - LABEL / 2, y + height / 2, token["row"], "label")
        labels += text(x + width / 2, y - 9, token["column"], "label")
    return outline + inside + labels + text(x + width / 2, at, token["name"], role)


def text(x: float, y: float, content: str, role: str) -> str:
    """A text centered at a point."""
    return f'<text class="{role}" x="{x:g}" y="{y:g}">{escape(content)}</text>'


def legend(kinds: set[str]) -> str:
    """The legend of the colors."""
    return " ".join(
        f'<span class="{kind}">{kind}</span>' for kind in ("frozen", "trained") if kind in kinds
    )

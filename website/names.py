"""Links names in code: ours to the reference, names of other libraries to their documentation."""

import re
import tomllib
from pathlib import Path

from website.reference import public_names

UPSTREAM = tomllib.loads(Path(__file__).with_name("upstream.toml").read_text(encoding="utf-8"))

ADDRESSES: dict[str, str] = {
    name: table["url"].format(name=name)
    for table in UPSTREAM["names"].values()
    for name in table["names"]
}

# Our names are linked with their module, and also without it if they are unambiguous.
UNAMBIGUOUS = re.compile(r"[a-z]+_\w+|LORA_\w+|[A-Z]\w*[a-z0-9][A-Z]\w+")
OURS: dict[str, str] = {name: name for name in public_names()} | {
    name.rpartition(".")[2]: name
    for name in sorted(public_names())
    if UNAMBIGUOUS.fullmatch(name.rpartition(".")[2])
}

# A link, a heading or a code block, which are not changed; or a name or call in text.
PART = re.compile(
    r"<(a|autoref|h\d|pre)\b.*?</\1>|<code>(?P<name>[A-Za-z_][\w.]*)(?:\([^<]*\))?</code>",
    re.DOTALL,
)


def link_names(html: str) -> str:
    """The page with a link for each known name."""

    def link(match: re.Match[str]) -> str:
        name = match["name"] or ""
        if name in OURS:
            return f'<autoref identifier="{OURS[name]}" optional>{match[0]}</autoref>'
        if name in ADDRESSES:
            return f'<a href="{ADDRESSES[name]}">{match[0]}</a>'
        return match[0]

    return PART.sub(link, html)

"""Prints the entries of CHANGELOG.md for a version. `python3 release/notes.py v0.1.0`."""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(version: str) -> str | None:
    """The section of a version without its heading, or None if it is missing."""
    text = CHANGELOG.read_text(encoding="utf-8")
    heading = re.compile(rf"^## \[{re.escape(version)}\].*\n", re.MULTILINE)
    match = heading.search(text)
    return match and text[match.end() :].partition("\n## [")[0].strip()


if __name__ == "__main__":
    version = sys.argv[1].removeprefix("v")
    print(notes(version) or sys.exit(f"CHANGELOG.md does not have a section for {version}"))

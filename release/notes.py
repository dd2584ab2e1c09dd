"""Prints the entries of CHANGELOG.md for a version. `python3 release/notes.py v0.1.0`."""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(version: str) -> str | None:
    """The section of a version without its heading, or None where there is none."""
    text = CHANGELOG.read_text(encoding="utf-8")
    heading = re.compile(rf"^## \[{re.escape(version)}\].*\n", re.MULTILINE)
    found = heading.search(text)
    return found and text[found.end() :].partition("\n## [")[0].strip()


if __name__ == "__main__":
    wanted = sys.argv[1].removeprefix("v")
    found = notes(wanted)
    print(found or sys.exit(f"CHANGELOG.md has no section for {wanted}"))

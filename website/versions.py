"""The shared version of the packages, and their install commands."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PROJECTS: dict[str, dict[str, Any]] = {
    path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
VERSION: str = PROJECTS["lorax-core"]["version"]
REPOSITORY: str = PROJECTS["lorax-core"]["urls"]["Source"]


def from_git(package: str) -> str:
    """The address that pip installs a package from until it is published."""
    return f'"{package} @ git+{REPOSITORY}#subdirectory=packages/{package}"'


# After publication: "lorax-core lorax-io".
INSTALL = " ".join(from_git(package) for package in ("lorax-core", "lorax-io"))

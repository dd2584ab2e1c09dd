"""Checks what a release says of itself: versions, names, addresses, notes.

`python -m release.check`, and with `--tag v0.1.0` that the tag is the version and has notes.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import yaml
from website.versions import PROJECTS, ROOT

from release.notes import notes

# In place of the account that hosts the repository until there is one.
PLACEHOLDER = "OWNER"

# Files that name the repository, which pyproject.toml of the core defines.
NAME_THE_REPOSITORY = [
    *["README.md", "mkdocs.yml", "SECURITY.md", "docs/install.md", "docs/index.md"],
    *(f"packages/{package}/README.md" for package in PROJECTS),
]

# Those that name the site: its own configuration, and the last line of each error and warning.
NAME_THE_DOCUMENTATION = ["mkdocs.yml", "packages/lorax-core/src/lorax/_errors.py"]


def main() -> None:
    """Prints each fault, and exits with 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="of the release, such as v0.1.0")
    parser.add_argument("--offline", action="store_true", help="do not ask the package index")
    options = parser.parse_args()
    found = list(faults(options.tag, options.offline))
    sys.exit("\n".join(found) if found else 0)


def faults(tag: str | None, offline: bool) -> Iterator[str]:
    """What keeps this from being released."""
    core = PROJECTS["lorax-core"]
    version, addresses = core["version"], core["urls"]
    for package, other in PROJECTS.items():
        if other["version"] != version:
            yield f"{package} has version {other['version']}, and lorax-core {version}"
        if other["urls"] != addresses:
            yield f"{package} has other [project.urls] than lorax-core"
        needed = [wanted for wanted in other["dependencies"] if wanted.startswith("lorax-")]
        if package != "lorax-core" and needed != [f"lorax-core~={version}"]:
            yield f"{package} needs {needed}, not lorax-core~={version}"
        if not offline and (published := versions_on_index(package)):
            print(f"{package} is published: {', '.join(published)}")
            if version in published:
                yield f"{package} {version} is published already"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    if str(citation["version"]) != version:
        yield f"CITATION.cff has version {citation['version']}, and lorax-core {version}"
    if citation["repository-code"] != addresses["Source"]:
        yield f"CITATION.cff has repository-code {citation['repository-code']}"
    for name in NAME_THE_REPOSITORY:
        if addresses["Source"] not in (ROOT / name).read_text(encoding="utf-8"):
            yield f"{name} does not name {addresses['Source']}"
    for name in NAME_THE_DOCUMENTATION:
        if f'"{addresses["Documentation"]}"' not in (ROOT / name).read_text(encoding="utf-8"):
            yield f"{name} does not name {addresses['Documentation']}"
    if tag and f"/{PLACEHOLDER}/" in addresses["Source"]:
        yield f"{addresses['Source']} does not say which account hosts the repository"
    if tag and tag != f"v{version}":
        yield f"the tag is {tag}, and the version {version}"
    if tag and not notes(version):
        yield f"CHANGELOG.md has no section [{version}]: rename [Unreleased]"


def versions_on_index(package: str) -> list[str]:
    """The versions that pip finds, none where the name is free."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", package]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        if "No matching distribution found" in asked.stderr:
            return []
        sys.exit(f"pip cannot ask for {package}:\n{asked.stderr}")
    lines = [line for line in asked.stdout.splitlines() if line.startswith("Available versions:")]
    return lines[0].partition(":")[2].replace(" ", "").split(",")


if __name__ == "__main__":
    main()

"""Checks the metadata of a release: versions, names, addresses and notes.

`python -m release.check`; with `--tag v0.1.0`, also checks that the tag is the version and has
notes.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import yaml
from website.versions import PROJECTS, ROOT

from release.notes import notes

# A placeholder for the account that will host the repository.
PLACEHOLDER = "OWNER"

# Files that contain the repository's address, which the core's pyproject.toml defines.
FILES_WITH_REPOSITORY_URL = [
    *["README.md", "mkdocs.yml", "SECURITY.md", "docs/install.md", "docs/index.md"],
    *(f"packages/{package}/README.md" for package in PROJECTS),
]

# Files that contain the site's address: its configuration, and the last line of each error.
FILES_WITH_SITE_URL = ["mkdocs.yml", "packages/lorax-core/src/lorax/_errors.py"]


def main() -> None:
    """Prints each fault, and exits with 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="of the release, such as v0.1.0")
    parser.add_argument("--offline", action="store_true", help="do not ask the package index")
    options = parser.parse_args()
    found = list(faults(options.tag, options.offline))
    sys.exit("\n".join(found) if found else 0)


def faults(tag: str | None, offline: bool) -> Iterator[str]:
    """Yields the reasons why this cannot be released."""
    core = PROJECTS["lorax-core"]
    version, addresses = core["version"], core["urls"]
    for package, other in PROJECTS.items():
        if other["version"] != version:
            yield f"{package} has version {other['version']}, but lorax-core has {version}"
        if other["urls"] != addresses:
            yield f"[project.urls] of {package} differs from that of lorax-core"
        needed = [wanted for wanted in other["dependencies"] if wanted.startswith("lorax-")]
        if package != "lorax-core" and needed != [f"lorax-core~={version}"]:
            yield f"{package} needs {needed}, not lorax-core~={version}"
        if not offline and (published := versions_on_index(package)):
            print(f"{package} is published: {', '.join(published)}")
            if version in published:
                yield f"{package} {version} is published already"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    if str(citation["version"]) != version:
        yield f"CITATION.cff has version {citation['version']}, but lorax-core has {version}"
    if citation["repository-code"] != addresses["Source"]:
        yield f"CITATION.cff has repository-code {citation['repository-code']}"
    for name in FILES_WITH_REPOSITORY_URL:
        if addresses["Source"] not in (ROOT / name).read_text(encoding="utf-8"):
            yield f"{name} does not contain {addresses['Source']}"
    for name in FILES_WITH_SITE_URL:
        if f'"{addresses["Documentation"]}"' not in (ROOT / name).read_text(encoding="utf-8"):
            yield f"{name} does not contain {addresses['Documentation']}"
    if tag and f"/{PLACEHOLDER}/" in addresses["Source"]:
        yield f"{addresses['Source']} still has the placeholder {PLACEHOLDER} for the account"
    if tag and tag != f"v{version}":
        yield f"the tag is {tag}, but the version is {version}"
    if tag and not notes(version):
        yield f"CHANGELOG.md has no section [{version}]: rename [Unreleased]"


def versions_on_index(package: str) -> list[str]:
    """The published versions of a package; empty if the name is free."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", package]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        if "No matching distribution found" in process.stderr:
            return []
        sys.exit(f"pip cannot query the versions of {package}:\n{process.stderr}")
    lines = [line for line in process.stdout.splitlines() if line.startswith("Available versions:")]
    return lines[0].partition(":")[2].replace(" ", "").split(",")


if __name__ == "__main__":
    main()

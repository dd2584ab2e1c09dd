"""Records of the last run of each cell, stored in files for the report."""

import contextlib
import datetime
import json
import pathlib
import re
import xml.etree.ElementTree as xml
from collections.abc import Generator
from typing import Any

FOLDER = pathlib.Path(".nox/matrix")


@contextlib.contextmanager
def recorded(session: str) -> Generator[dict[str, Any]]:
    """Yields a record, and writes it to a file at the end of the block, even after an error."""
    now = datetime.datetime.now(datetime.UTC)
    record: dict[str, Any] = {"session": session, "when": f"{now:%Y-%m-%d %H:%M}"}
    record |= {"outcome": "failed", "did": "installed", "jax": None, "counts": {}}
    try:
        yield record
        record["outcome"] = "passed"
    finally:
        _file(session).write_text(json.dumps(record, indent=2) + "\n")


def read(session: str) -> dict[str, Any] | None:
    """The record of a session, or None if it never ran."""
    file = _file(session)
    return json.loads(file.read_text()) if file.exists() else None


def counts(junit: pathlib.Path) -> dict[str, int]:
    """The numbers of tests that passed, failed and were skipped, from pytest's report."""
    if not junit.exists():
        return {}
    suite = next(xml.parse(junit).getroot().iter("testsuite"))
    reported = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = reported["failures"] + reported["errors"]
    passed = reported["tests"] - failed - reported["skipped"]
    return {"passed": passed, "failed": failed, "skipped": reported["skipped"]}


def _file(session: str) -> pathlib.Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER / (re.sub(r"[^\w.]+", "-", session).strip("-") + ".json")

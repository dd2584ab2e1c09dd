"""What is expected of each model, and what differs from it.

`expected.json` is what a run with `--record` found: how many weights are factored, which are built
and why, which are left out and why, and which adapters a step leaves alone. A run fails where it
finds anything else. A fault is never recorded there: it is known only by the `fault` that stands
beside the model, and fails the run again once the model no longer has it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .catalog import Model
from .finding import Finding

FILE = Path(__file__).parent / "expected.json"
RECORDED = ("weights", "factored", "materialized", "left_out", "unsaid", "still")


class Difference(NamedTuple):
    """One thing that is not as expected."""

    title: str
    what: str

    def __str__(self) -> str:
        return f"{self.title}: {self.what}"


def differences(models: Sequence[Model], findings: Sequence[Finding]) -> Iterator[Difference]:
    """All that is not as expected; `findings` are those of `models`, in the same order."""
    expected = json.loads(FILE.read_text()) if FILE.exists() else {}
    for model, finding in zip(models, findings, strict=True):
        yield from _faults(model, finding)
        known = expected.get(model.title)
        if known is None:
            yield Difference(model.title, "has no expectation: run with --record")
        elif finding.fault is None or model.fault is not None:
            yield from _changes(model.title, known, _recorded(finding))


def _faults(model: Model, finding: Finding) -> Iterator[Difference]:
    if model.fault is None:
        if finding.fault is not None:
            yield Difference(model.title, finding.fault)
    elif finding.fault is None:
        yield Difference(model.title, f"no longer fails; take its fault away: {model.fault}")
    elif model.fault not in finding.fault:
        yield Difference(model.title, f"fails in another way: {finding.fault}")


def _changes(title: str, known: dict[str, Any], found: dict[str, Any]) -> Iterator[Difference]:
    for key in RECORDED:
        before, after = known[key], found[key]
        if before == after:
            continue
        if isinstance(before, int):
            yield Difference(title, f"{key}: {after} instead of {before}")
            continue
        for path in sorted({*before, *after}):
            old, new = _at(before, path), _at(after, path)
            if old != new:
                yield Difference(title, f"{key}: `{path}`: {new} instead of {old}")


def _at(recorded: dict[str, str] | list[str], path: str) -> str:
    if path not in recorded:
        return "no"
    return recorded[path] if isinstance(recorded, dict) else "yes"


def _recorded(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(finding).items() if key in RECORDED}


def record(findings: Sequence[Finding]) -> None:
    """Makes what was found the expectation; other models keep theirs."""
    expected = json.loads(FILE.read_text()) if FILE.exists() else {}
    expected |= {finding.title: _recorded(finding) for finding in findings}
    FILE.write_text(json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False) + "\n")

"""The expected results of each model, and the differences from them.

`expected.json` has the findings of the last run with `--record`. A run fails if the numbers of
weights, the weights that are materialized or left out, or the reasons differ. Errors and times are
only reported. A fault is expected only if the model in `wild/models` names it, and a model that
names a fault fails if it does not occur.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .catalog import CATALOG, Model
from .finding import Finding

FILE = Path(__file__).parent / "expected.json"
COMPARED = ("weights", "factored", "materialized", "left_out", "unreported", "unchanged")


class Difference(NamedTuple):
    """One unexpected result."""

    title: str
    description: str

    def __str__(self) -> str:
        return f"{self.title}: {self.description}"


def differences(models: Sequence[Model], findings: Sequence[Finding]) -> Iterator[Difference]:
    """Yields the unexpected results. `findings` are those of `models`, in the same order."""
    expected = recorded()
    for model, finding in zip(models, findings, strict=True):
        yield from _faults(model, finding)
        known = expected.get(model.title)
        if known is None:
            yield Difference(model.title, "no expected results: run with --record")
        elif finding.fault is None or model.fault is not None:
            yield from _changes(model.title, known, finding)


def _faults(model: Model, finding: Finding) -> Iterator[Difference]:
    if model.fault is None:
        if finding.fault is not None:
            yield Difference(model.title, finding.fault)
    elif finding.fault is None:
        yield Difference(model.title, f"no longer fails; remove its fault: {model.fault}")
    elif model.fault not in finding.fault:
        yield Difference(model.title, f"fails in another way: {finding.fault}")


def _changes(title: str, known: Finding, actual: Finding) -> Iterator[Difference]:
    for key in COMPARED:
        before, after = getattr(known, key), getattr(actual, key)
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


def recorded() -> dict[str, Finding]:
    """The results of the last run with `--record`, by title."""
    if not FILE.exists():
        return {}
    return {title: Finding(title, **rest) for title, rest in json.loads(FILE.read_text()).items()}


def record(models: Sequence[Model], findings: Sequence[Finding]) -> list[Finding]:
    """Accepts the results of `models`; returns all accepted results.

    Results of models that are no longer in the catalog are removed.
    """
    all_results = recorded() | {model.title: f for model, f in zip(models, findings, strict=True)}
    kept = {title: all_results[title] for title in sorted(all_results) if title in CATALOG}
    rows = {title: dataclasses.asdict(finding) for title, finding in kept.items()}
    for row in rows.values():
        del row["title"]
    FILE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return list(kept.values())

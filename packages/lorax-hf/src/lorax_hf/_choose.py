"""Resolves a user's targets to parameters: named choices, ends of names, patterns, functions."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax import SpecError

from ._rows import Row, ends_in

Targets = str | Sequence[str] | re.Pattern[str] | Callable[[str], bool]

NAMED = ("default", "attention", "mlp", "all-linear", "embeddings", "experts")


def is_named(targets: Targets) -> bool:
    """Whether targets are one of the named choices, such as "attention"."""
    return isinstance(targets, str) and targets in NAMED


def choose(rows: Sequence[Row], targets: Targets, option: str) -> set[str]:
    """The paths of the rows that targets select.

    Args:
        rows: the rows to choose from.
        targets: as in `spec`.
        option: the name of the argument, for errors.

    Raises:
        SpecError: if nothing is selected, or one of several ends matches nothing.
    """
    if is_named(targets):
        paths = {row.path for row in rows if targets in row.words}
        if not paths:
            raise SpecError(f"{option}={targets!r}: this architecture has none. {_known(rows)}")
        return paths
    accepts = _accepts(rows, targets, option)
    paths = {row.path for row in rows if accepts(row.module)}
    if not paths:
        how = ""
        if isinstance(targets, str) and any(ends_in((targets,), row.module) for row in rows):
            how = f"A string must match the whole name; to match its end, pass [{targets!r}]. "
        hint = how or _suggestion(str(targets), rows)
        raise SpecError(f"{option}={shown(targets)} matches no module. {hint}".rstrip())
    return paths


def _accepts(rows: Sequence[Row], targets: Targets, option: str) -> Callable[[str], Any]:
    if isinstance(targets, str):
        return re.compile(targets).fullmatch
    if isinstance(targets, re.Pattern):
        return targets.search
    if callable(targets):
        return targets
    for end in targets:
        if not any(ends_in((end,), row.module) for row in rows):
            raise SpecError(f"{option}: no module is called {end!r}. {_suggestion(end, rows)}")
    return lambda module: ends_in(tuple(targets), module)


def check_patterns(rows: Sequence[Row], option: str, patterns: Mapping[str, Any]) -> None:
    """Raises `SpecError` if a pattern does not match the end of any module's name."""
    for key in patterns:
        if not matches_any(key, [row.module for row in rows]):
            raise SpecError(f"{option}: no module ends in {key!r}. {_suggestion(key, rows)}")


def matches_any(key: str, modules: Sequence[str]) -> bool:
    """Whether a pattern matches the end of one of these names."""
    return any(_matches(key, module) for module in modules)


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    return next((value for key, value in patterns.items() if _matches(key, module)), default)


def shown(targets: Any) -> str:
    """Targets for a message, as the user wrote them."""
    return repr(targets.pattern if isinstance(targets, re.Pattern) else targets)


def _ends(rows: Sequence[Row]) -> list[str]:
    return sorted({row.module.rpartition(".")[2] for row in rows})


def _known(rows: Sequence[Row]) -> str:
    return f"Its modules end in: {', '.join(_ends(rows))}."


def _suggestion(name: str, rows: Sequence[Row]) -> str:
    matches = difflib.get_close_matches(name.rpartition(".")[2], _ends(rows), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, matches))}? " if matches else ""
    return f"{hint}{_known(rows)}"


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None

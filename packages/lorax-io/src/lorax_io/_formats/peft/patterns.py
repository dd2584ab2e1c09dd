"""Matches module names against untrusted lists and regular expressions, in bounded time."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import regex

from ..._errors import AdapterFileError

# Time limits for untrusted patterns: for one match, and for all of one adapter. A match normally
# takes microseconds.
_SECONDS_EACH = 1.0
_SECONDS = 5.0


def suffixes(name: str) -> list[str]:
    """The name and its proper ends after a dot: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(len(parts))]


def prefixes(name: str) -> list[str]:
    """The beginnings of a name before each dot, and the name: `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def listed(target: Sequence[str] | str | None) -> Callable[[str], bool]:
    """A predicate on names: whether one ends in an entry of a list, or fully matches a pattern."""
    if isinstance(target, str):
        pattern = regex.compile(rf"(?:{target})\Z")
        return lambda name: match(pattern, name) is not None
    ends = frozenset(target or ())
    return lambda name: not ends.isdisjoint(suffixes(name))


class Patterns:
    """Values by pattern: the first key that matches the end of a name decides, as in PEFT."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = list(values.values())
        self._order = {key: k for k, key in enumerate(values)}
        self._patterns = [
            (k, regex.compile(rf"(.*\.)?({key})$"))
            for key, k in self._order.items()
            if not is_plain(key)
        ]

    def find(self, name: str, default: Any) -> Any:
        """The value of the first key that matches; `default` if none does."""
        literal = [self._order[end] for end in suffixes(name) if end in self._order]
        first = min(literal, default=len(self._values))
        for k, pattern in self._patterns:
            if k >= first:
                break
            if match(pattern, name):
                return self._values[k]
        return self._values[first] if literal else default


def is_plain(key: str) -> bool:
    """Whether a pattern is a plain name, which matches only itself."""
    return all(part.replace("_", "a").replace("-", "a").isalnum() for part in key.split("."))


_seconds_left = contextvars.ContextVar("seconds left for patterns", default=_SECONDS)


@contextlib.contextmanager
def distrusted() -> Generator[None]:
    """Bounds the time for matching patterns inside this block; exceeding it is the file's error."""
    token = _seconds_left.set(_SECONDS)
    try:
        yield
    except TimeoutError as error:
        raise AdapterFileError(
            "the patterns of its config take too long to match, so it may be malicious."
        ) from error
    except (regex.error, RecursionError) as error:
        raise AdapterFileError(
            f"a pattern of its config is not a regular expression in its place ({error})."
        ) from error
    finally:
        _seconds_left.reset(token)


def match(pattern: Any, name: str) -> Any:
    """Matches a compiled pattern at the beginning of a name, within the time that is left.

    Raises:
        TimeoutError: if no time is left.
    """
    left = _seconds_left.get()
    if left <= 0:
        raise TimeoutError
    begin = time.perf_counter()
    try:
        return pattern.match(name, timeout=min(left, _SECONDS_EACH))
    finally:
        _seconds_left.set(left - (time.perf_counter() - begin))

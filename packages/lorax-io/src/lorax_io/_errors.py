"""Errors and warnings of reading and writing adapters, and the file that they name."""

import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Generator
from pathlib import Path

from lorax import LoraxError, LoraxWarning

_LONGEST = 1000  # characters of a message: names in a file may be of megabytes

_place: contextvars.ContextVar[str | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def about(place: object) -> Generator[None]:
    """A block in which errors and warnings are about one file, folder or parameter."""
    token = _place.set(str(place))
    try:
        yield
    finally:
        _place.reset(token)


class AdapterError(LoraxError, ValueError):
    """An adapter that cannot be read or written; nothing was applied and nothing replaced.

    Attributes:
        path: the file or folder, or None where it is about none.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, reason: str, path: object = None) -> None:
        if len(reason) > _LONGEST:
            reason = f"{reason[: _LONGEST // 2]} … {reason[-_LONGEST // 2 :]}"
        place = _place.get() if path is None else str(path)
        super().__init__(reason, place)
        self.path = None if place is None else Path(place)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """There is no such file."""


class AdapterFileError(AdapterError):
    """A file that is damaged, or not of the format it was read as."""


class AdapterMismatchError(AdapterError):
    """An adapter that does not fit the parameters or the names it was given with."""


class UnsupportedAdapterError(AdapterError):
    """An adapter that cannot be had in this form: its kind is not read or written there."""


class AdapterWarning(LoraxWarning):
    """Something in an adapter that was left out or may not be as it was."""


def warn(message: str) -> None:
    """Warns with the place before the message, at the line that called this package."""
    place = _place.get()
    text = message if place is None else f"{place}: {message}"
    warnings.warn(text, AdapterWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How far up the first frame outside of this package is."""
    here, level, frame = str(Path(__file__).parent), 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    return level

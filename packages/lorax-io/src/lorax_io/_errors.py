"""Errors and warnings about adapters, each naming the file that it is about."""

import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Generator
from pathlib import Path

from lorax import LoraxError, LoraxWarning

# The reason of an `AdapterWriteError`.
UNEQUAL = (
    "the file differs from what was written, so it was removed. Check the disk, or write to "
    "another one."
)

# The end of each `DeprecationWarning`.
UNTIL = "The old name will be removed in the next minor version."

_LONGEST = 1000  # characters in a message; a name from an untrusted file may be megabytes long

_place: contextvars.ContextVar[str | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def about(place: object) -> Generator[None]:
    """Inside this block, errors and warnings name this file, folder or parameter."""
    token = _place.set(str(place))
    try:
        yield
    finally:
        _place.reset(token)


class AdapterError(LoraxError, ValueError):
    """An adapter cannot be read or written; nothing was applied, and no file was replaced.

    Attributes:
        path: the file or folder, or None if the error is not about one.
        reason: what is wrong, and what to do about it.
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
    """The file or folder does not exist."""


class AdapterWriteError(AdapterError, OSError):
    """What was written does not read back the same; a file that was there before is kept."""


class AdapterFileError(AdapterError):
    """The file is damaged, or is not of the expected format."""


class AdapterMismatchError(AdapterError):
    """The adapter does not fit the given parameters or names."""


class UnsupportedAdapterError(AdapterError):
    """The format does not support this kind of adapter."""


class AdapterWarning(LoraxWarning):
    """Part of an adapter was left out, or may have changed."""


def warn(message: str, category: type[Warning] = AdapterWarning) -> None:
    """Warns, naming the current place, at the line of the user's code that called this package."""
    place = _place.get()
    text = message if place is None else f"{place}: {message}"
    warnings.warn(text, category, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` of the first frame outside this package."""
    here, level, frame = str(Path(__file__).parent), 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    return level

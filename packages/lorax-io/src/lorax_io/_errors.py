"""What reading and writing adapters raises and warns with."""

from pathlib import Path

from lorax import LoraxError

_LONGEST = 1000  # characters of a message: names in a file may be of megabytes


class AdapterError(LoraxError, ValueError):
    """An adapter that cannot be read or written; nothing was applied and nothing replaced.

    Attributes:
        path: the file or folder.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, path: object, reason: str) -> None:
        if len(reason) > _LONGEST:
            reason = f"{reason[: _LONGEST // 2]} … {reason[-_LONGEST // 2 :]}"
        super().__init__(path, reason)
        self.path = Path(str(path))
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """There is no such file."""


class AdapterFileError(AdapterError):
    """A file that is damaged, or not of the format it was read as."""


class AdapterMismatchError(AdapterError):
    """An adapter that does not fit the parameters or the names it was given with."""


class UnsupportedAdapterError(AdapterError):
    """An adapter that cannot be had in this form: its kind is not read or written there."""


class AdapterWarning(UserWarning):
    """Something in an adapter that was left out or may not be as it was."""

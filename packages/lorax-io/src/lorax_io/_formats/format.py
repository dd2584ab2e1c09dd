"""The definition of a format: a row of the table behind opening, converting and the messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .._tree import Held
from .source import Source, Tensors


class Content(NamedTuple):
    """The content of a file, by which its format is detected."""

    file: Tensors
    folder: Path | None = None  # that has `adapter_config.json`; None where there is none
    alpha: float | None = None  # as the caller gave it


class Rows(NamedTuple):
    """An adapter that needs no names: a tree's own rows."""

    rows: dict[str, Any]
    held: Held


class Format(NamedTuple):
    """One format of adapters.

    Attributes:
        name: for the command.
        description: for messages and help.
        recognizes: whether a file is of it.
        read: the adapter, in PEFT's words or as rows.
        loads: what loads it onto parameters.
        saved: the function that writes it; None where none does.
        files: the names that its files have in a folder.
        takes_alpha: whether its files lack alpha, so that the caller gives it.
    """

    name: str
    description: str
    recognizes: Callable[[Content], bool]
    read: Callable[[Content], Source | Rows]
    loads: str = "lorax_io.load_any(path, params, names)"
    files: tuple[str, ...] = ()
    saved: str | None = None
    takes_alpha: bool = False

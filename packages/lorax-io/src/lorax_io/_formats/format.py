"""The definition of a format: a row of the table behind opening, converting and the messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .._tree import FrozenFactors
from .source import Source, Tensors


class Content(NamedTuple):
    """The content of a file, by which its format is detected."""

    file: Tensors
    folder: Path | None = None  # the folder, if it has an `adapter_config.json`
    alpha: float | None = None  # as given by the caller


class Rows(NamedTuple):
    """An adapter whose file has the paths of a tree, so that it needs no names."""

    rows: dict[str, Any]
    frozen: FrozenFactors


class Format(NamedTuple):
    """One format of adapters.

    Attributes:
        name: its name on the command line.
        description: its name in messages and help.
        recognizes: whether a file is in this format.
        read: reads the adapter, as a `Source` in PEFT's terms, or as rows.
        loads: the call that loads it onto parameters, for messages.
        saved: the name of the function that writes it; None if there is none.
        files: the names of its files in a folder.
        takes_alpha: whether its files lack alpha, so that the caller must give it.
    """

    name: str
    description: str
    recognizes: Callable[[Content], bool]
    read: Callable[[Content], Source | Rows]
    loads: str = "lorax_io.load_any(path, params, names)"
    files: tuple[str, ...] = ()
    saved: str | None = None
    takes_alpha: bool = False

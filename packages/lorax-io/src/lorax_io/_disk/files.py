"""Atomic writing of files, and checks of paths that are not trusted."""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Generator
from pathlib import Path

from .._errors import UNEQUAL, AdapterFileError, AdapterNotFoundError, AdapterWriteError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yields a new path to write to, which replaces `path` if the block ends without an error.

    At every moment `path` is the complete old file or the complete new one. A process that is
    killed inside the block leaves a hidden file next to it, `.name.….tmp` or safetensors' own
    `.tmp…`, which may be deleted.
    """
    path = Path(path).resolve()  # replaces the target of a link, as writing with `open` does
    if path.is_dir():
        raise AdapterFileError("is a folder, so no file can be written there.", path)
    if not path.parent.is_dir():
        raise AdapterNotFoundError(f"{path.parent} is not a folder; create it first.", path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        if path.exists():
            shutil.copymode(path, unfinished)  # as writing with `open` keeps it
        _flush(unfinished)
        os.replace(unfinished, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened to flush it
            _flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless it exists."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise AdapterFileError(f"cannot be created: {error}", path) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically, after reading it back."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        if unfinished.read_text(encoding="utf-8") != text:
            raise AdapterWriteError(UNEQUAL, path)


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, checked to be a regular file."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError("there is no such file.", path) from error
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"cannot be opened: {error}", path) from error
    if stat.S_ISDIR(mode):
        raise AdapterFileError("is a folder; a file was expected.", path)
    if not stat.S_ISREG(mode):
        raise AdapterFileError("is neither a file nor a folder.", path)
    return path


def file_in(folder: Path, name: str) -> Path:
    """The path of a regular file in an untrusted folder; a link out of the folder is an error."""
    path = regular_file(folder / name)
    target, home = path.resolve(), folder.resolve()
    # The Hub's cache keeps `snapshots/<revision>/<name>` as links to `blobs/<hash>`.
    snapshots = next((up for up in home.parents if up.name == "snapshots"), None)
    blobs = home if snapshots is None else snapshots.parent / "blobs"
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise AdapterFileError(f"is a link to {target}, outside its folder.", path)
    return path

"""HDF5 files that contain only arrays, each stored in the file itself."""

import contextlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax import MissingPackageError

from .._errors import UNEQUAL, AdapterFileError, AdapterWriteError, about
from .files import regular_file, replacing

MAGIC = b"\x89HDF\r\n\x1a\n"
_MOST = 100_000  # datasets, groups or attributes
_STRING = 3  # H5T_STRING


class Entry(NamedTuple):
    """One array of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Hdf5File:
    """The arrays of an HDF5 file by path, all read when the file is opened.

    HDF5 also allows links to other files, virtual arrays, and compressed arrays that are far larger
    than the file. Each of these is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        h5py = _import_h5py()
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.metadata: dict[str, str] = {}
        with about(path):
            try:
                with h5py.File(path, "r") as file:
                    self._read(h5py, file, "")
                    self.metadata = _strings(file.attrs)
            except AdapterFileError:
                raise
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
                raise AdapterFileError(f"is not a valid HDF5 file ({error}).") from error
        self.entries = {name: Entry(x.dtype, x.shape) for name, x in self._arrays.items()}

    def _read(self, h5py: Any, group: Any, begin: str) -> None:
        for key in group:
            name = f"{begin}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise AdapterFileError(f"has `{name}`, a link. Only arrays in the file are read.")
            item = group[key]
            if len(self._arrays) > _MOST or begin.count("/") > 16:
                raise AdapterFileError("has too many groups for an adapter.")
            if isinstance(item, h5py.Group):
                self._read(h5py, item, f"{name}/")
            elif isinstance(item, h5py.Dataset):
                self._arrays[name] = _array(name, item)
            else:
                raise AdapterFileError(f"has `{name}`, which is not an array.")

    def view(self, name: str) -> np.ndarray[Any, Any]:
        """One array, by name."""
        return self._arrays[name]


def _strings(attributes: Any) -> dict[str, str]:
    """The attributes of a group that are strings; others are not read."""
    if len(attributes) > _MOST:
        raise AdapterFileError("has too many attributes for an adapter.")
    kinds = {name: attributes.get_id(name).get_type().get_class() for name in attributes}
    strings = {name for name, kind in kinds.items() if kind == _STRING}
    return {name: x for name in strings if isinstance(x := attributes[name], str)}


def _array(name: str, dataset: Any) -> np.ndarray[Any, Any]:
    dtype = dataset.dtype
    if dtype.kind not in "fiub" or dataset.is_virtual or dataset.external:
        raise AdapterFileError(f"has `{name}`, which is not an array of numbers in the file.")
    size = dtype.itemsize * int(np.prod(dataset.shape, dtype=object))
    if dataset.chunks is not None or dataset.id.get_storage_size() != size:
        raise AdapterFileError(f"has `{name}` in a compressed form, or without all of its numbers.")
    # JAX rejects arrays in the other byte order.
    return np.asarray(dataset[()]).astype(dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def open_hdf5(path: Path) -> Generator[Hdf5File]:
    """Opens an HDF5 file; inside the block, errors name it."""
    file = Hdf5File(path)
    with about(path):
        yield file


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its first bytes."""
    if path.is_dir():
        return False
    with open(regular_file(path), "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_hdf5(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replaces a file atomically by these arrays, after reading it back and comparing."""
    h5py = _import_h5py()
    with about(path), replacing(path) as unfinished:
        with h5py.File(unfinished, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)
            file.attrs.update(metadata or {})
        written = Hdf5File(unfinished)
        is_complete = written.entries.keys() == arrays.keys()
        if (
            not is_complete
            or written.metadata != dict(metadata or {})
            or any(
                written.view(name).tobytes() != np.asarray(x, order="C").tobytes()
                for name, x in arrays.items()
            )
        ):
            raise AdapterWriteError(UNEQUAL, path)


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingPackageError(
            'Keras\'s files need h5py: pip install "lorax-io[keras]"'
        ) from error
    return h5py

"""safetensors files: written atomically, checked when they are opened, read by slices."""

import contextlib
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from .._errors import (
    UNEQUAL,
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterWriteError,
    about,
)
from .files import regular_file, replacing
from .strangers import identified

# JAX's types by the format's names; the format lacks 2- and 4-bit integers and complex128.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "F8_E8M0": jnp.dtype(jnp.float8_e8m0fnu),
    "F8_E4M3FNUZ": jnp.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": jnp.dtype(jnp.float8_e5m2fnuz),
}
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file whose header has been checked.

    The `safetensors` library decides whether it is well-formed. In addition, no name may occur
    twice in the header, and JAX must support every type. Tensors are views of the memory-mapped
    file, so that a slice reads only its own bytes. (The library's NumPy reader does not support
    8-bit floats.)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with about(path):
            self.path = regular_file(path)
            self._open()

    def _open(self) -> None:
        try:
            with safetensors.safe_open(self.path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError, UnicodeError) as error:
            with contextlib.suppress(OSError), open(self.path, "rb") as file:
                if stranger := identified(file.read(64)):
                    raise AdapterFileError(f"{stranger}.") from error
            raise AdapterFileError(f"is not a safetensors file ({error}).") from error
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = _parse_header(file.read(min(size, _LONGEST_HEADER)))
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._begin = 8 + size
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {name: _entry(name, value) for name, value in header.items()}

    def __enter__(self) -> "TensorFile":
        self._about = about(self.path)
        self._about.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._about.__exit__(kind, error, traceback)
        # The mapping is freed with its last view: closing it before that is an error.
        del self._bytes

    def view(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as a read-only view of the file; bytes are read when they are used."""
        dtype, shape, begin, end = self.entries[name]
        data = np.frombuffer(self._bytes, np.uint8, end - begin, self._begin + begin)
        return data.view(dtype).reshape(shape)


def _parse_header(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise AdapterFileError("its header does not begin with '{'.")
    return parse_json(data.decode())


def parse_json(text: str) -> Any:
    """Parses JSON; raises if a key occurs twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise AdapterFileError(f"has the key {twice!r} twice.")
        return parsed

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterFileError(f"is not JSON that can be read ({error}).") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    with about(path):
        try:
            return parse_json(path.read_text(encoding="utf-8"))
        except UnicodeError as error:
            raise AdapterFileError(f"is not UTF-8 text ({error}).") from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can represent."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _entry(name: str, value: Any) -> Entry:
    if value["dtype"] not in DTYPES:
        raise AdapterFileError(f"{name!r} is of type {value['dtype']}, which JAX does not have.")
    return Entry(DTYPES[value["dtype"]], tuple(value["shape"]), *value["data_offsets"])


def check_dtype(name: str, dtype: Any) -> None:
    """Rejects a dtype that the format cannot hold."""
    if dtype not in DTYPES.values():
        raise AdapterError(f"`{name}` is {dtype}, which a safetensors file cannot hold.")


def check_width(name: str, dtype: Any) -> None:
    """Rejects a 64-bit dtype that JAX would convert to 32 bits."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise AdapterMismatchError(
            f"has `{name}` in {dtype}, which JAX would convert to 32 bits. Set `jax_enable_x64`."
        )


def check_finite(name: str, array: np.ndarray[Any, Any]) -> None:
    """Rejects NaN and infinity, and bytes other than 0 and 1 in an array of bools."""
    if array.dtype == bool and (array.view(np.uint8) > 1).any():
        raise AdapterFileError(f"`{name}` has a boolean that is neither true nor false.")
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        finite = not jnp.issubdtype(array.dtype, jnp.inexact) or np.isfinite(array).all()
    if not finite:
        raise AdapterError(f"`{name}` holds NaN or infinity: the training has diverged.")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
    *,
    of_base: Container[str] = (),
) -> None:
    """Replaces a file atomically by these tensors, after reading it back and comparing.

    Tensors in `of_base` are not trained and may hold infinity, as masks do; others may not.
    """
    with about(path):
        _write_tensors(Path(path), tensors, metadata, of_base)


def _write_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
    of_base: Container[str],
) -> None:
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise AdapterError("a parameter cannot be called `__metadata__` in this format.")
        check_dtype(name, tensor.dtype)
        if name not in of_base:
            check_finite(name, tensor)
    # C order matters: safetensors 0.8.0 writes memory as it is, so that a transposed view would
    # come back with its values in the wrong places. (`ascontiguousarray` makes scalars vectors.)
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with replacing(path) as unfinished:
        try:
            safetensors.numpy.save_file(dict(tensors), unfinished, metadata=dict(metadata))
        except (safetensors.SafetensorError, UnicodeError) as error:
            raise AdapterError(f"cannot be written: {error}") from error
        _sort_metadata(unfinished)
        _compare(unfinished, tensors, metadata)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in place, so that the same adapter always gives the same bytes.

    The library writes metadata in a different order each time.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _compare(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]
) -> None:
    with TensorFile(path) as file:
        same = file.metadata == dict(metadata) and file.entries.keys() == tensors.keys()
        if not same or not all(_is_same(file.view(name), x) for name, x in tensors.items()):
            raise AdapterWriteError(UNEQUAL, path)


def _is_same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and np.array_equal(
        left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)
    )

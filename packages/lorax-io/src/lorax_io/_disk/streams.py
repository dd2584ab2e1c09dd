"""Writes safetensors files that are larger than memory, tensor by tensor and atomically."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._errors import UNEQUAL, AdapterError, AdapterWriteError
from .files import replacing
from .tensors import DTYPES, TensorFile, check_dtype

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PART = 2**18  # bytes that are checked at a time


def write_stream(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Any],
    metadata: Mapping[str, str],
    tensors: Iterator[tuple[str, np.ndarray[Any, Any]]],
    *,
    write: bool = True,
) -> None:
    """Replaces a file atomically by these tensors, after reading it back and comparing.

    Args:
        path: the file.
        shapes: for each tensor by name, anything with a shape and a dtype.
        metadata: strings for the header.
        tensors: yields each name and tensor, in the order of `in_order(shapes)`.
        write: whether this process writes; the others only help to gather the tensors.

    Raises:
        AdapterError: if the format cannot hold a tensor or its name.
        AdapterWriteError: if the file does not read back the same.
    """
    if not write:
        for _ in tensors:
            pass
        return
    header = _header(shapes, metadata)
    with replacing(path) as unfinished:
        sums: dict[str, int] = {}
        with open(unfinished, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, tensor in tensors:
                data = np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data
                sums[name] = zlib.crc32(data)
                file.write(data)
        with TensorFile(unfinished) as written:
            same = written.metadata == dict(metadata) and written.entries.keys() == sums.keys()
            if not same or any(sums[name] != _sum_of(written.view(name)) for name in sums):
                raise AdapterWriteError(UNEQUAL, path)


def in_order(shapes: Mapping[str, Any]) -> list[str]:
    """The order of tensors in the file: the widest types first, so that each is aligned."""
    return sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))


def _header(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in in_order(shapes):
        shape, dtype = tuple(shapes[name].shape), np.dtype(shapes[name].dtype)
        check_dtype(name, dtype)
        if name == "__metadata__":
            raise AdapterError("a parameter cannot be called `__metadata__` in this format.")
        end = begin + int(np.prod(shape, dtype=object)) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeError as error:
        raise AdapterError(f"cannot be written: {error}") from error
    return text + b" " * (-len(text) % 8)


def parts_of(tensor: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor, flattened, in parts small enough to check with little memory."""
    flat = tensor.reshape(-1)
    step = max(1, _PART // tensor.dtype.itemsize)
    return (flat[k : k + step] for k in range(0, flat.size, step))


def _sum_of(tensor: np.ndarray[Any, Any]) -> int:
    checksum = 0
    for part in parts_of(tensor):
        checksum = zlib.crc32(part.view(np.uint8).data, checksum)
    return checksum

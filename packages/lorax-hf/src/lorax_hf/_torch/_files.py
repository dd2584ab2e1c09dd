"""The tensors of a folder of safetensors files, read one at a time."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open

from .._errors import CheckpointError, CheckpointNotFoundError
from ._place import placed

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


_ALIGNMENT = 64  # in bytes
_STEP = 1 << 24  # in bytes


class Entry(NamedTuple):
    """Where a tensor is in its file."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class Files:
    """The tensors of a checkpoint.

    Attributes:
        entries: where each tensor is, by name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file in _files(self.folder):
            entries = _entries(file)
            if twice := sorted(entries.keys() & self.entries.keys()):
                raise CheckpointError(
                    f"`{twice[0]}` is in two files of {self.folder}: {file.name} and "
                    f"{self.entries[twice[0]].file.name}. Remove one of them."
                )
            self.entries |= entries

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as a PyTorch tensor, for transformers' converters."""
        with safe_open(self.entries[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def placed(self, name: str, sharding: Any) -> jax.Array:
        """A tensor as an array on its devices; each device reads only its own part."""
        entry = self.entries[name]
        if sharding is None or not entry.shape or 0 in entry.shape:
            return placed(_read(entry), sharding)
        return jax.make_array_from_callback(
            entry.shape, sharding, lambda index: self.part(name, index)
        )

    def part(self, name: str, index: Any) -> np.ndarray[Any, Any]:
        """A copy of the part of a tensor at an index."""
        entry = self.entries[name]
        if not entry.shape or 0 in entry.shape:
            return _read(entry)[index]
        return np.array(np.memmap(entry.file, entry.dtype, "r", entry.offset, entry.shape)[index])

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same; they are compared in parts."""
        a, b = (_bytes(self.entries[name]) for name in (one, other))
        steps = range(0, max(len(a), 1), _STEP)
        return len(a) == len(b) and all(
            np.array_equal(a[k : k + _STEP], b[k : k + _STEP]) for k in steps
        )


def _bytes(entry: Entry) -> np.ndarray[Any, Any]:
    size = math.prod(entry.shape) * entry.dtype.itemsize
    if not size:
        return np.empty(0, np.uint8)
    return np.memmap(entry.file, np.uint8, "r", entry.offset, (size,))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Uninitialized memory, aligned so that JAX can use it on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _read(entry: Entry) -> np.ndarray[Any, Any]:
    whole = aligned(entry.shape, entry.dtype)
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        if file.readinto(whole.reshape(-1).view(np.uint8).data) != whole.nbytes:
            raise CheckpointError(f"{entry.file} is truncated: it ends before its last tensor.")
    return whole


def _entries(file: Path) -> dict[str, Entry]:
    with safe_open(file, framework="numpy"):
        pass  # Checked: its header fits the file.
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, row in header.items():
        if row["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"`{name}` in {file} is of the type {row['dtype']}, which is not read."
            )
        dtype, shape = np.dtype(_DTYPES[row["dtype"]]), tuple(row["shape"])
        entries[name] = Entry(file, dtype, shape, 8 + length + row["data_offsets"][0])
    return entries


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"{folder} is not a folder. `load_torch` reads one with config.json and safetensors "
            "files, such as `huggingface_hub.snapshot_download` or `save_pretrained` makes."
        )
    if (folder / _INDEX).exists():
        try:
            entries = json.loads((folder / _INDEX).read_text())["weight_map"]
            files = sorted({folder / file for file in entries.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / _INDEX} is not an index of safetensors files."
            ) from error
        outside = [file for file in files if file.parent != folder]
        missing = [file for file in files if not file.is_file()]
        if wrong := sorted(map(str, outside + missing)):
            raise CheckpointNotFoundError(
                f"{folder / _INDEX} names {wrong[0]}, which is not in the folder."
            )
        return files
    if not (folder / _SINGLE).is_file():
        raise CheckpointNotFoundError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; files of another format are read by "
            "`from_pretrained` and `from_torch`."
        )
    return [folder / _SINGLE]

"""The files of a merged model: those of its base, or those that a GGUF file becomes."""

import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from .._disk.progress import track
from .._disk.tensors import TensorFile
from .._places import Array
from .checkpoint import Checkpoint
from .decoding import home_of
from .merged import WEIGHTS_NAME, shard_name, shards

SHARD_BYTES = 5 * 10**9


class Lazy(NamedTuple):
    """A tensor that is read when it is written."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Array]

    @classmethod
    def of(cls, array: Array) -> Self:
        """One that already exists."""
        return cls(array.shape, array.dtype, lambda: array)


class Output(NamedTuple):
    """One file that is written."""

    file: Path  # in the folder
    prefix: str  # what the checkpoint's names have before those in the file
    tensors: dict[str, Lazy]
    entries: Container[str]  # the names in the base's own file
    metadata: Mapping[str, str]


def outputs(checkpoint: Checkpoint, floats: Mapping[str, Any]) -> Iterator[Output]:
    """Each file; that of the base that it is read from is open until the next one.

    Args:
        checkpoint: the base.
        floats: the quantized weights that are written as floats.
    """
    if checkpoint.is_gguf:
        yield from _of_gguf(checkpoint)
        return
    gone = {name for weight in floats.values() for name in weight.coded.names}
    for path, prefix in track(checkpoint.files, "Merging"):
        with TensorFile(path) as file:
            tensors: dict[str, Lazy] = {
                name: Lazy(entry.shape, entry.dtype, functools.partial(file.view, name))
                for name, entry in file.entries.items()
                if prefix + name not in gone
            }
            copies = {n: of for n, of in checkpoint.copies.items() if of in tensors}
            tensors |= {name: tensors[of] for name, of in copies.items()}
            for weight in floats.values():
                if home_of(weight, file.entries, prefix):
                    name = weight.name.removeprefix(prefix)
                    tensors[name] = Lazy(weight.coded.shape, weight.dtype, weight.array)
            yield Output(_within(path, checkpoint), prefix, tensors, file.entries, file.metadata)


def _within(path: Path, checkpoint: Checkpoint) -> Path:
    """Where a file of the base is in its folder."""
    return path.relative_to(checkpoint.path) if checkpoint.path.is_dir() else Path(path.name)


def _of_gguf(checkpoint: Checkpoint) -> Iterator[Output]:
    for file, names in files_of_gguf(checkpoint).items():
        tensors: dict[str, Lazy] = {}
        for name in names:
            weight = checkpoint.coded[checkpoint.copies.get(name, name)]
            tensors[name] = Lazy(weight.shape, weight.dtype, weight.array)
        yield Output(Path(file), "", tensors, (), {"format": "pt"})


def files_of_gguf(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The names in each file that a GGUF file becomes."""
    sizes = {name: bytes_of(shape) for name, shape in checkpoint.shapes.items()}
    parts = shards(sizes, SHARD_BYTES)
    if len(parts) == 1:
        return {WEIGHTS_NAME: parts[0]}
    return {shard_name(k, len(parts)): names for k, names in enumerate(parts)}


def bytes_of(shape: Any) -> int:
    """The bytes of an array of a shape and a dtype."""
    return math.prod(shape.shape) * shape.dtype.itemsize

"""Writes frozen trees."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import QuantizedWeight

from .._disk.arrays import one_writer, to_host
from .._disk.packed import DTYPES, Packed
from .._disk.progress import bars, track
from .._disk.streams import in_order, write_stream
from .._disk.tensors import check_dtype
from .._errors import AdapterError, about
from .._formats.native import FROZEN_KEY, PREFIX
from .._formats.signature import signature
from .._tree import frozen_leaves, is_array
from .header import BASES, FORMAT, PACKED, Entry, all_arrays, check_numbers


def save_frozen(
    path: str | os.PathLike[str],
    frozen: Any,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Writes a frozen tree to one safetensors file, atomically.

    Quantized weights stay quantized; 4-bit codes are packed, two to a byte. Tensors are gathered
    and written one after the other. A new file is written next to the old one, flushed, read back
    and compared, and only then replaces it. Every process must call this; the first one writes.

    Args:
        path: the file.
        frozen: the frozen tree, or a tree of parameters, quantized or not.
        metadata: further strings for the file's header, which `read_metadata` returns. Keys must
            not begin with `lorax.`.
        progress: whether to show a progress bar, on a terminal, if saving takes long.

    Raises:
        AdapterError: if two arrays have the same name, an array holds NaN or has a dtype that the
            format lacks, or a scale of a quantized weight is infinite.

    Example:
        >>> import jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> frozen = lorax.quantize({"kernel": jnp.ones((64, 3))}, {"kernel": "nf4"})
        >>> file = pathlib.Path(tempfile.mkdtemp(), "base.safetensors")
        >>> lorax_io.save_frozen(file, frozen)
        >>> params = {"kernel": jnp.zeros((64, 3))}
        >>> lorax_io.load_frozen(file, params=params)["kernel"].format
        'nf4'
    """
    with about(path), bars(progress):
        if taken := [key for key in metadata or {} if key.startswith(PREFIX)]:
            raise AdapterError(f"metadata keys may not begin with {PREFIX!r}: {taken}.")
        entries = {
            leaf_path: Entry.of(leaf) for leaf_path, leaf in frozen_leaves(frozen)[0].items()
        }
        arrays, codecs = all_arrays(entries), formats(entries)
        for name, array in arrays.items():
            _check_array(name, array)
        packed = {
            name: Packed.of(array) for name, array in arrays.items() if array.dtype.name in DTYPES
        }
        shapes = {name: _stored(name, array, packed) for name, array in arrays.items()}
        header = {
            **(metadata or {}),
            FROZEN_KEY: FORMAT,
            **signature(),
            BASES: json.dumps({p: entry.settings() for p, entry in entries.items()}),
            PACKED: json.dumps({name: row.settings() for name, row in packed.items()}),
        }

        def tensors() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
            for name in track(in_order(shapes), "Saving the frozen tree"):
                array = arrays[name]
                numbers = to_host(packed[name].pack(array) if name in packed else array)
                check_numbers(name, numbers, codecs.get(name))
                yield name, numbers

        with one_writer() as writer:
            write_stream(path, shapes, header, tensors(), write=writer)


def formats(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The format of the quantized weight that each array belongs to, by the array's name."""
    return {
        f"{path}/{name}": entry.base.codec
        for path, entry in entries.items()
        if isinstance(entry.base, QuantizedWeight)
        for name in entry.base.names
    }


def _check_array(name: str, array: Any) -> None:
    if not is_array(array):
        raise AdapterError(f"`{name}` is {type(array).__name__}, not an array.")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise AdapterError(f"`{name}` holds PRNG keys; save `jax.random.key_data` of them.")


def _stored(name: str, array: Any, packed: Mapping[str, Packed]) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array's tensor in the file."""
    if name in packed:
        return jax.ShapeDtypeStruct(packed[name].bytes_shape, jnp.uint8)
    check_dtype(name, array.dtype)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)

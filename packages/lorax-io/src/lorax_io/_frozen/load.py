"""Reads frozen trees, tensor by tensor, each onto its own devices."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lorax import ArgumentError, FrozenWeight, QuantizedWeight

from .._disk.arrays import all_read, place, sharding_of
from .._disk.packed import Packed
from .._disk.progress import bars, track
from .._disk.tensors import TensorFile
from .._errors import AdapterMismatchError, warn
from .._tree import base_of, frozen_leaves, is_array, suggestion, with_leaves
from .header import Entry, all_arrays, check_numbers, read_header
from .save import formats


def load_frozen(
    path: str | os.PathLike[str],
    params: Any = None,
    *,
    like: Any = None,
    sharding: Any = None,
    progress: bool = True,
) -> Any:
    """Reads the frozen tree that `save_frozen` has written, bit for bit.

    Args:
        path: the file.
        params: the model's parameters, as arrays or `jax.ShapeDtypeStruct`. The result has their
            structure, and each base is sharded like its parameter, if that is committed to devices.
        like: instead of `params`, a frozen tree of arrays or shapes. Its formats, shapes and dtypes
            must be those of the file, and arrays are sharded like its own.
        sharding: where to put the weights: one sharding, or a tree of shardings with the structure
            of the parameters or a prefix of it. Codes and scales are sharded like their weight. A
            process reads only the bytes that its devices hold.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The frozen tree. Without `like`, frozen factors are replicated over the mesh of their base.

    Raises:
        AdapterError: if the file is damaged or not a frozen tree, holds NaN, or does not fit.
            Nothing is returned in part.

    Warns:
        AdapterWarning: if weights have other dtypes than the parameters.

    Example:
        >>> import jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> frozen = {"kernel": jnp.ones((64, 3)), "bias": jnp.zeros(3)}
        >>> file = pathlib.Path(tempfile.mkdtemp(), "base.safetensors")
        >>> lorax_io.save_frozen(file, frozen)
        >>> lorax_io.load_frozen(file, like=frozen)["bias"].tolist()
        [0.0, 0.0, 0.0]
    """
    if (params is None) == (like is None):
        raise ArgumentError("load_frozen needs either `params` or `like`.")
    given = params if like is None else like
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars(progress))
        with all_read(given, sharding):
            file = stack.enter_context(TensorFile(path))
            entries, packed = read_header(file)
            leaves, structure = frozen_leaves(given)
            _check_paths(entries, leaves)
            if like is None:
                _fit_params(entries, leaves)
            else:
                entries = _fit_like(entries, leaves)
            wanted = None if sharding is None else spread(sharding, structure, leaves)
            places: dict[str, Sharding | None] = {}
            for leaf_path, entry in entries.items():
                places |= _places(leaf_path, entry, leaves[leaf_path], wanted, like is not None)
        with all_read(given, sharding):
            arrays = _arrays(file, entries, packed, places)
    rows = {path: _leaf(path, entry, arrays) for path, entry in entries.items()}
    return with_leaves(structure, leaves, rows)


def _check_paths(entries: Mapping[str, Entry], leaves: Mapping[str, Any]) -> None:
    if unknown := sorted(entries.keys() - leaves.keys()):
        raise AdapterMismatchError(
            f"has `{unknown[0]}`, which the tree that was given does not have."
            f"{suggestion(unknown[0], leaves)}"
        )
    if missing := sorted(leaves.keys() - entries.keys()):
        raise AdapterMismatchError(
            f"lacks `{missing[0]}`, which the tree that was given has."
            f"{suggestion(missing[0], entries)}"
        )


def _fit_params(entries: Mapping[str, Entry], leaves: Mapping[str, Any]) -> None:
    """Checks that shapes are those of the parameters; warns if dtypes differ."""
    other: list[str] = []
    for path, entry in entries.items():
        leaf = base_of(leaves[path])
        if entry.base is None:
            continue
        if not is_array(leaf) or tuple(leaf.shape) != tuple(entry.base.shape):
            actual = f"shape {tuple(leaf.shape)}" if is_array(leaf) else f"{type(leaf).__name__}"
            raise AdapterMismatchError(
                f"has `{path}` of shape {tuple(entry.base.shape)}; the parameters have {actual}."
            )
        if leaf.dtype != entry.base.dtype:
            other.append(f"`{path}` in {entry.base.dtype}, not {leaf.dtype}")
    if other:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        warn(f"has weights in other dtypes than the parameters: {other[0]}{more}.")


def _fit_like(entries: Mapping[str, Entry], leaves: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries, checked against `like`; settings of adapters, which affect no array, are its."""
    fit: dict[str, Entry] = {}
    for path, entry in entries.items():
        wanted = Entry.of(leaves[path])
        fit[path] = entry = entry._replace(adapter=wanted.adapter)
        for suffix, ours, theirs in (
            ("", entry.settings(), wanted.settings()),
            (" of", _shapes(path, entry), _shapes(path, wanted)),
        ):
            if ours != theirs:
                raise AdapterMismatchError(f"has `{path}`{suffix} {ours}, but `like` has {theirs}.")
    return fit


def _shapes(path: str, entry: Entry) -> dict[str, str]:
    arrays = entry.arrays(path)
    return {name: f"{array.dtype} {tuple(array.shape)}" for name, array in arrays.items()}


def spread(sharding: Any, structure: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The sharding of each leaf, by path, from one sharding, a tree of them or a prefix of it."""
    blanks = jax.tree.unflatten(structure, range(len(leaves)))
    if isinstance(sharding, Sharding):
        return dict.fromkeys(leaves, sharding)
    shardings = jax.tree.leaves(jax.tree.broadcast(sharding, blanks))
    return dict(zip(leaves, shardings, strict=True))


def _places(
    path: str, entry: Entry, leaf: Any, requested: Mapping[str, Any] | None, has_like: bool
) -> dict[str, Sharding | None]:
    """The sharding of each array of a leaf, by name."""
    if has_like and requested is None:
        own = Entry.of(leaf).arrays(path)
        return {name: sharding_of(array) for name, array in own.items()}
    return places_of(
        path, entry, sharding_of(base_of(leaf)) if requested is None else requested[path]
    )


def places_of(path: str, entry: Entry, sharding: Sharding | None) -> dict[str, Sharding | None]:
    """The sharding of each array of a leaf, by name, given that of its weight."""
    places: dict[str, Sharding | None] = dict.fromkeys(entry.arrays(path), sharding)
    if sharding is None or entry.base is None:
        return places
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
        places |= {f"{path}/{name}": everywhere for name in entry.factors}
    if isinstance(entry.base, QuantizedWeight):
        split = entry.base.shardings(sharding)
        places |= {f"{path}/{name}": where for name, where in split.items()}
    return places


def _arrays(
    file: TensorFile,
    entries: Mapping[str, Entry],
    packed: Mapping[str, Packed],
    places: Mapping[str, Sharding | None],
) -> dict[str, jax.Array]:
    """The arrays by name, in the order of the file."""
    codecs, wanted = formats(entries), all_arrays(entries)

    def load(name: str) -> jax.Array:
        view = file.view(name)

        def read(index: Any) -> np.ndarray[Any, Any]:
            # Bytes of packed codes are unpacked to another array at once. Any other array may
            # keep this memory, so it needs a copy: the file may be replaced while it lives.
            part = view[index] if name in packed else np.array(view[index])
            check_numbers(name, part, codecs.get(name))
            return part

        if name not in packed:
            return place(view.shape, view.dtype, read, places[name])
        row, where = packed[name], places[name]
        return row.unpack(place(view.shape, view.dtype, read, row.bytes_sharding(where)), where)

    names = [name for name in file.entries if name in wanted]
    return {name: load(name) for name in track(names, "Loading the frozen tree")}


def _leaf(path: str, entry: Entry, arrays: Mapping[str, jax.Array]) -> Any:
    base, factors, adapter = entry
    if base is None:
        return None
    if isinstance(base, QuantizedWeight):
        base = dataclasses.replace(base, arrays={n: arrays[f"{path}/{n}"] for n in base.names})
    else:
        base = arrays[path]
    frozen = {name: arrays[f"{path}/{name}"] for name in factors}
    return FrozenWeight(base, frozen, adapter) if frozen else base

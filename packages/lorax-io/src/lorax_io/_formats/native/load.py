"""Reads native files, onto a base or without one."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import Adapter, ArgumentError, Pair

from ..._disk.arrays import all_read, place, placements
from ..._disk.progress import bars, track
from ..._disk.tensors import (
    TensorFile,
    check_finite,
    check_width,
)
from ..._errors import AdapterError, AdapterFileError
from ..._shapes import base_shape, complete
from ..._tree import (
    FrozenFactors,
    all_arrays,
    filled,
    frozen_of,
    leaves_of,
    param_leaves,
    with_leaves,
)
from ..format import Content, Format, Rows
from ..source import check_any
from .fingerprint import check_base
from .fit import fit_like, fit_params
from .header import FORMAT_KEY, read_header


def load_adapter(
    path: str | os.PathLike[str],
    params: Any = None,
    *,
    like: Any = None,
    sharding: Any = None,
    progress: bool = True,
) -> Any:
    """Reads the tunable tree that `save_adapter` has written, bit for bit.

    Args:
        path: the file.
        params: the base's parameters, as arrays or `jax.ShapeDtypeStruct`. The result has their
            structure, and each factor is sharded like its base.
        like: instead of `params`, a tunable tree of arrays or shapes. Its structure, ranks, alphas,
            shapes and dtypes must be those of the file.
        sharding: where to put the arrays: one sharding, or a tree of shardings with the structure
            of the result or a prefix of it. A process reads only the bytes that it needs.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The tunable tree. `load_pair` returns the frozen tree as well.

    Raises:
        AdapterError: if the file is damaged or not native, holds NaN or infinity, or does not fit.
            Nothing is returned in part. If arrays span several processes, an error in one of them
            is raised in all.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)}
        >>> frozen, tunable = lorax.init_lora(params, {"kernel": 2, "bias": 0}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, tunable)
        >>> lorax_io.load_adapter(file, params=jax.eval_shape(lambda: params))["kernel"].rank
        2
    """
    if (params is None) == (like is None):
        raise ArgumentError("load_adapter needs either `params` or `like`.")
    if like is None:
        with bars(progress):
            loaded = read(path, params, sharding, with_frozen=False)
        return with_leaves(loaded.structure, loaded.leaves, loaded.rows)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars(progress))
        with all_read(like, sharding):
            file = stack.enter_context(TensorFile(path))
            rows = fit_like(file, read_header(file), like)
            leaves, structure = leaves_of(like)
            places = placements(rows, {}, structure, leaves, sharding)
        with all_read(like, sharding):
            rows, _ = load_arrays(file, rows, {}, places)
    tree = with_leaves(structure, leaves, rows)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def load_pair(
    path: str | os.PathLike[str], params: Any, *, sharding: Any = None, progress: bool = True
) -> Pair:
    """Reads a file that `save_adapter` has written, as the pair `(frozen, tunable)`.

    Args:
        path: the file.
        params: the base's parameters, as arrays or `jax.ShapeDtypeStruct`.
        sharding: where to put the arrays, as in `load_adapter`.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The `lorax.Pair`. `frozen` has the arrays of `params` themselves, not copies, and the frozen
        factors that some kinds of adapters need. These are computed from the base if possible, as
        DoRA's norms are, and read from the file otherwise.

    Raises:
        AdapterError: as `load_adapter` does, and if a frozen factor is neither in the file nor
            computed from the base.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3))}
        >>> pair = lorax.init_lora(params, {"kernel": lorax.DoraSpec(2)}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, pair)
        >>> lorax_io.load_pair(file, params).frozen["kernel"].factors["square"].tolist()
        [5.0, 5.0, 5.0]
    """
    with bars(progress):
        loaded = read(path, params, sharding, with_frozen=True)
    return Pair(
        frozen_of(loaded.leaves, loaded.structure, loaded.rows, loaded.frozen),
        with_leaves(loaded.structure, loaded.leaves, loaded.rows),
    )


class Loaded(NamedTuple):
    """Loaded rows, and the parameters that they belong to."""

    rows: dict[str, Any]
    frozen: FrozenFactors
    leaves: Mapping[str, Any]
    structure: Any


def read(
    path: str | os.PathLike[str], params: Any, sharding: Any = None, *, with_frozen: bool
) -> Loaded:
    """Reads the rows of a file onto a base, with or without frozen factors."""
    with contextlib.ExitStack() as stack:
        with all_read(params, sharding):
            file = stack.enter_context(TensorFile(path))
            leaves, structure = param_leaves(params)
            rows, frozen = fit_params(file, read_header(file), leaves)
            places = placements(rows, frozen, structure, leaves, sharding)
        with all_read(params, sharding):
            check_base(file, params, rows)  # this may gather the base from all processes
            rows, frozen = load_arrays(file, rows, frozen if with_frozen else {}, places)
            if with_frozen:
                weights = {p: row for p, row in rows.items() if isinstance(row, Adapter)}
                frozen = {
                    p: complete(p, weight, leaves[p], frozen.get(p, {}))
                    for p, weight in weights.items()
                }
    return Loaded(rows, frozen, leaves, structure)


def load_alone(file: TensorFile) -> tuple[dict[str, Any], FrozenFactors]:
    """Reads the rows and the frozen factors of a native file, without a base."""
    header = read_header(file)
    rows: dict[str, Any] = {}
    shapes = {
        name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in file.entries.items()
    }
    for name, shape in shapes.items():
        check_width(name, shape.dtype)
    for path, blank in header.blanks.items():
        rows[path] = filled(path, blank, shapes)
        try:
            if blank is not None:
                base_shape(rows[path])
        except AdapterError as error:
            raise AdapterFileError(
                f"has factors of `{path}` that do not fit its axes: {error.reason}."
            ) from error
    frozen = {
        path: {name: shapes[f"{path}/{name}"] for name in names}
        for path, names in header.frozen.items()
    }
    return load_arrays(file, rows, frozen, dict.fromkeys(file.entries))


def _recognizes(content: Content) -> bool:
    return FORMAT_KEY in content.file.metadata


def _read_alone(content: Content) -> Rows:
    assert isinstance(content.file, TensorFile)
    check_any({name: entry.shape for name, entry in content.file.entries.items()})
    return Rows(*load_alone(content.file))


FORMAT = Format(
    "native",
    "a native file",
    _recognizes,
    _read_alone,
    "lorax_io.load_adapter(path, params=params)",
    saved="save_adapter",
)


def load_arrays(
    file: TensorFile, rows: Mapping[str, Any], frozen: FrozenFactors, places: Mapping[str, Any]
) -> tuple[dict[str, Any], FrozenFactors]:
    """Reads the arrays of rows and frozen factors that have only shapes."""

    def load(name: str) -> jax.Array:
        view = file.view(name)

        def read(index: Any) -> np.ndarray[Any, Any]:
            part = np.array(view[index])  # a copy: the file may be replaced while the array lives
            check_finite(name, part)
            return part

        return place(view.shape, view.dtype, read, places[name])

    wanted = all_arrays(rows, frozen)
    names = [name for name in file.entries if name in wanted]
    arrays = {name: load(name) for name in track(names, "Loading the adapter")}
    return (
        {path: filled(path, row, arrays) for path, row in rows.items()},
        {path: {n: arrays[f"{path}/{n}"] for n in factors} for path, factors in frozen.items()},
    )

"""The native format: one safetensors file, one tensor for each array of the tunable tree.

A tensor is named by its path in the tree; a LoRA weight at `attn/kernel` is the two tensors
`attn/kernel/a` and `attn/kernel/b`. What shapes a delta without being an array (rank, alpha,
scaling, axes) is JSON in the file's header, beside what is known of the base.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lorax import LoraSpec, LoraWeight

from ._errors import AdapterError, AdapterFileError, AdapterMismatchError, AdapterWarning
from ._host import all_read, one_writer, place, placed_like, placements, sharding_of, to_host
from ._progress import track
from ._tensors import (
    TensorFile,
    check_dtype,
    check_finite,
    check_width,
    is_number,
    parse_json,
    write_tensors,
)
from ._tree import (
    absent,
    all_arrays,
    arrays_of,
    base_shape,
    blank_weights,
    filled,
    is_array,
    leaves_of,
    near,
    param_leaves,
    settings_of,
    tunable_rows,
    with_leaves,
)

_PREFIX = "lorax."
FORMAT_KEY, _VERSION, _ADAPTER, _BASE = (
    _PREFIX + key for key in ("format", "version", "adapter", "base")
)


def save_adapter(
    path: str | os.PathLike[str],
    tunable: Any,
    *,
    base: Any = None,
    hash_base: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a tunable tree to one safetensors file, whole or not at all.

    The file is written beside the old one, flushed, read back, compared, and only then put in its
    place. Arrays that live on several devices or hosts are gathered one after the other; every
    process calls this, the first one writes, and the others wait for it.

    Args:
        path: the file.
        tunable: the second tree of `lorax.init_lora`, trained or not.
        base: the parameters the adapter belongs to, or the frozen tree. The file keeps a
            fingerprint of their paths, shapes and dtypes, so that it is not loaded onto another
            model.
        hash_base: whether the fingerprint is of the base's numbers, too. This reads all of them.
        metadata: further strings for the file's header. Keys that begin with `lorax.` are taken.

    Raises:
        AdapterError: where two parameters share a path, or an array holds NaN, infinity or a type
            that the format has not.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"kernel": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, tunable, base=params, metadata={"base": "my-model"})
        >>> lorax_io.read_metadata(file)
        {'base': 'my-model'}
        >>> tunable = lorax_io.load_adapter(file, params=params)
    """
    rows = tunable_rows(path, tunable)
    arrays: dict[str, Any] = {}
    for row in rows:
        for name, array in arrays_of(*row).items():
            if name in arrays:
                raise AdapterError(path, f"two arrays are both called `{name}`; rename one.")
            check_dtype(path, name, array.dtype)
            arrays[name] = array
    if taken := [key for key in metadata or {} if key.startswith(_PREFIX)]:
        raise AdapterError(path, f"metadata keys may not begin with {_PREFIX!r}: {taken}.")
    header = {
        **(metadata or {}),
        FORMAT_KEY: "1",
        _VERSION: importlib.metadata.version("lorax-io"),
        _ADAPTER: json.dumps({row.path: settings_of(row.leaf) for row in rows}),
    }
    if base is not None:
        header[_BASE] = json.dumps(_fingerprint(path, base, dict(rows), hash_base))
    gathered = {name: to_host(array) for name, array in track(arrays.items(), "Saving the adapter")}
    with one_writer() as writer:
        if writer:
            write_tensors(path, gathered, header)


def load_adapter(
    path: str | os.PathLike[str], *, params: Any = None, like: Any = None, sharding: Any = None
) -> Any:
    """Reads a file of `save_adapter`; the tree is to the bit what was saved.

    Args:
        path: the file.
        params: the base's parameters, of arrays or `jax.ShapeDtypeStruct`: the tree gets their
            structure, and where they are arrays the factors are placed as their base is.
        like: instead of `params`, a tunable tree of the same structure, of arrays or shapes; its
            ranks, alphas, shapes and dtypes must be those of the file.
        sharding: where to put the arrays: one sharding, or a tree of them with the structure of
            the result or a prefix of it. Only the bytes that a process needs are read.

    Returns:
        The tunable tree, for `(frozen, tunable)`.

    Raises:
        AdapterError: where the file is damaged or not native, holds NaN or infinity, or does not
            fit; nothing is returned in part. Where arrays lie in several processes, an error of
            one is an error in all of them.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)}
        >>> frozen, tunable = lorax.init_lora(params, {"kernel": 2, "bias": 0}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, tunable)
        >>> lorax_io.load_adapter(file, params=jax.eval_shape(lambda: params))["kernel"].a.shape
        (5, 2)
    """
    if (params is None) == (like is None):
        raise TypeError("load_adapter needs `params` or `like`: one of them, and not both.")
    with contextlib.ExitStack() as stack:
        with all_read(params, like, sharding):
            file = stack.enter_context(TensorFile(path))
            specs = read_specs(file)
            if like is None:
                rows, structure, paths = _fit_params(file, specs, params)
            else:
                rows, structure, paths = _fit_like(file, specs, like)
            places = placements(rows, structure, paths, sharding)
        with all_read(params, like, sharding):
            if like is None:
                _check_base(file, params, rows)  # this may gather the base from all processes
            rows = _load(file, rows, places)
    tree = with_leaves(structure, paths, rows)
    return (
        tree
        if like is None
        else jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The `metadata` that `save_adapter` was given.

    Raises:
        AdapterError: where the file is damaged or not native.

    Example:
        >>> import jax.numpy as jnp, lorax_io, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, {"bias": jnp.zeros(3)}, metadata={"task": "reviews"})
        >>> lorax_io.read_metadata(file)
        {'task': 'reviews'}
    """
    with TensorFile(path) as file:
        _check_format(file)
        return user_metadata(file.metadata)


def user_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a header is the user's."""
    return {key: value for key, value in metadata.items() if not key.startswith(_PREFIX)}


def load_alone(file: TensorFile) -> dict[str, Any]:
    """The rows of a native file, without a base to fit them to."""
    specs = read_specs(file)
    base: dict[str, Any] = {}
    for path, spec in specs.items():
        if spec is None:
            shape = file.entries[path].shape
        else:
            a, b = (file.entries[f"{path}/{name}"].shape for name in "ab")
            shape = base_shape(a, b, spec)
        if shape is None:
            raise AdapterFileError(file.path, f"has factors of `{path}` that do not fit its axes.")
        base[path] = jax.ShapeDtypeStruct(shape, np.float32)
    rows, _, _ = _fit_params(file, specs, base)
    return _load(file, rows, dict.fromkeys(file.entries))


def _load(file: TensorFile, rows: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """The rows with their arrays."""

    def load(name: str) -> jax.Array:
        view = file.view(name)

        def read(index: Any) -> np.ndarray[Any, Any]:
            part = np.array(view[index])  # a copy: the file may be replaced while the array lives
            check_finite(file.path, name, part)
            return part

        return place(view.shape, view.dtype, read, places[name])

    arrays = {name: load(name) for name in track(file.entries, "Loading the adapter")}
    return {path: filled(path, row, arrays) for path, row in rows.items()}


def _check_format(file: TensorFile) -> None:
    found = file.metadata.get(FORMAT_KEY)
    if found == "1":
        return
    raise AdapterFileError(
        file.path,
        "is a safetensors file, but no native adapter; `load_peft` reads the folders of PEFT."
        if found is None
        else f"is a native adapter of format {found!r}; this version of lorax-io reads format 1.",
    )


def read_specs(file: TensorFile) -> dict[str, LoraSpec | None]:
    """What the header says of each parameter: a spec, or None where it is trained in full."""
    _check_format(file)
    found = parse_json(file.path, file.metadata.get(_ADAPTER, ""))
    if not isinstance(found, dict):
        raise AdapterFileError(file.path, f"its header has no object under {_ADAPTER!r}.")
    specs = {path: _read_spec(file, path, settings) for path, settings in found.items()}
    wanted: set[str] = set()
    for path, spec in specs.items():
        for name in [path] if spec is None else [f"{path}/a", f"{path}/b"]:
            if name in wanted:
                raise AdapterFileError(file.path, f"its header has two uses for `{name}`.")
            wanted.add(name)
    if missing := sorted(wanted - file.entries.keys()):
        raise AdapterFileError(file.path, f"lacks the tensor `{missing[0]}` of its header.")
    if extra := sorted(file.entries.keys() - wanted):
        raise AdapterFileError(file.path, f"has a tensor `{extra[0]}` that its header knows not.")
    return specs


def _read_spec(file: TensorFile, path: str, settings: Any) -> LoraSpec | None:
    def check(ok: bool) -> None:
        if not ok:
            raise AdapterFileError(
                file.path, f"its header says of `{path}` what is no setting: {settings!r}."
            )

    check(isinstance(settings, dict))
    fields = dict(settings)
    kind = fields.pop("kind", None)
    if kind == "full":
        check(not fields)
        return None
    axes = ("in_axes", "out_axes", "shared_axes")
    check(kind == "lora" and fields.keys() == {"rank", "alpha", "scaling", *axes})
    check(type(fields["rank"]) is int and fields["rank"] >= 1)
    alpha = fields["alpha"]
    check(alpha is None or is_number(alpha))
    check(fields["scaling"] in ("standard", "rslora"))
    for name in axes:
        check(isinstance(fields[name], list) and all(type(axis) is int for axis in fields[name]))
        fields[name] = tuple(fields[name])
    return LoraSpec(**fields)


def _fit_params(
    file: TensorFile, specs: Mapping[str, LoraSpec | None], params: Any
) -> tuple[dict[str, Any], Any, Any]:
    leaves, structure = param_leaves(params)
    weights = blank_weights(file.path, leaves, {p: s for p, s in specs.items() if s is not None})
    rows: dict[str, Any] = {}
    for path, spec in specs.items():
        base = leaves.get(path)
        if spec is not None:
            rows[path] = placed_like(base, weights[path])
        elif is_array(base):
            rows[path] = placed_like(base, base)
        else:
            raise AdapterMismatchError(
                file.path, f"trains `{path}` in full, {absent(path, leaves)}"
            )
    _check_entries(file, rows)
    return rows, structure, leaves


def _fit_like(
    file: TensorFile, specs: Mapping[str, LoraSpec | None], like: Any
) -> tuple[dict[str, Any], Any, Any]:
    wanted = dict(tunable_rows(file.path, like))
    if unknown := sorted(specs.keys() - wanted.keys()):
        raise AdapterMismatchError(
            file.path, f"has `{unknown[0]}`, which `like` has not.{near(unknown[0], wanted)}"
        )
    if missing := sorted(wanted.keys() - specs.keys()):
        raise AdapterMismatchError(
            file.path, f"lacks `{missing[0]}`, which `like` has.{near(missing[0], specs)}"
        )
    for path, leaf in wanted.items():
        spec = specs[path]
        settings = settings_of(spec)
        if settings != settings_of(leaf):
            raise AdapterMismatchError(
                file.path, f"has `{path}` with {settings}, but `like` has {settings_of(leaf)}."
            )
    for name, array in all_arrays(wanted).items():
        if file.entries[name].dtype != array.dtype:
            raise AdapterMismatchError(
                file.path,
                f"has `{name}` in {file.entries[name].dtype}, but `like` has {array.dtype}.",
            )
    leaves, structure = leaves_of(like)
    rows = {path: jax.tree.map(_shape_and_place, leaf) for path, leaf in wanted.items()}
    _check_entries(file, rows)
    return rows, structure, leaves


def _shape_and_place(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_of(array))


def _check_entries(file: TensorFile, rows: Mapping[str, Any]) -> None:
    for name, array in all_arrays(rows).items():
        entry = file.entries[name]
        if entry.shape != array.shape:
            raise AdapterMismatchError(
                file.path, f"has `{name}` of shape {entry.shape}, but {array.shape} would fit."
            )
        check_width(file.path, name, entry.dtype)


def _fingerprint(file: Any, base: Any, rows: Mapping[str, Any], content: bool) -> dict[str, str]:
    """Hashes of the base's paths with their shapes, with their dtypes, and of its numbers.

    A parameter that is trained in full is in the adapter itself: its shape counts, its numbers do
    not, and the base may be the frozen tree that has None there.
    """
    leaves, _ = param_leaves(base)
    full = {path: leaf for path, leaf in rows.items() if not isinstance(leaf, LoraWeight)}
    if absent_rows := sorted(rows.keys() - leaves.keys()):
        raise AdapterMismatchError(
            file, f"adapts `{absent_rows[0]}`, {absent(absent_rows[0], leaves)}"
        )
    arrays = {path: leaf for path, leaf in {**leaves, **full}.items() if is_array(leaf)}
    found = {
        "shapes": _hash(f"{path} {list(arrays[path].shape)}" for path in sorted(arrays)),
        "dtypes": _hash(f"{path} {arrays[path].dtype}" for path in sorted(arrays)),
    }
    if content:
        digest = hashlib.sha256()
        for path in track(sorted(arrays.keys() - full.keys()), "Hashing the base"):
            digest.update(path.encode())
            numbers = np.asarray(to_host(arrays[path]), order="C")
            digest.update(numbers.reshape(-1).view(np.uint8).data)
        found["content"] = digest.hexdigest()
    return found


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_base(file: TensorFile, params: Any, rows: Mapping[str, Any]) -> None:
    """Refuses another base; warns of the same base in other dtypes."""
    if _BASE not in file.metadata:
        return
    saved = parse_json(file.path, file.metadata[_BASE])
    if not isinstance(saved, dict):
        raise AdapterFileError(file.path, f"its header has no object under {_BASE!r}.")
    # The numbers can be compared only where there are some.
    numbers = all(
        isinstance(leaf, jax.Array | np.ndarray)
        for leaf in param_leaves(params)[0].values()
        if is_array(leaf)
    )
    found = _fingerprint(file.path, params, rows, "content" in saved and numbers)
    other = [key for key, value in found.items() if saved.get(key) != value]
    if other == ["dtypes"]:
        warnings.warn(
            f"{file.path}: was saved for a base of the same shapes in other dtypes.",
            AdapterWarning,
            stacklevel=3,
        )
    elif other:
        raise AdapterMismatchError(
            file.path,
            f"belongs to another base: the parameters have other {' and '.join(other)} than those "
            "it was saved for. Load it onto the base that it was trained on.",
        )

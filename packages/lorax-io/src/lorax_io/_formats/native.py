"""The native format: one safetensors file, one tensor for each array of the tunable tree.

A tensor is named by its path in the tree; plain LoRA at `attn/kernel` is the two tensors
`attn/kernel/a` and `attn/kernel/b`. What shapes a weight without being an array (kind, rank, alpha,
axes) is JSON in the file's header, beside what is known of the base. Of a pair, the frozen factors
beside the bases are tensors too, and the header lists their names.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax import Adapter, Pair, adapter_from_settings

from .._disk.arrays import all_read, one_writer, place, placements, shape_of, to_host
from .._disk.progress import bars, track
from .._disk.tensors import (
    TensorFile,
    check_dtype,
    check_finite,
    check_width,
    parse_json,
    write_tensors,
)
from .._errors import AdapterError, AdapterFileError, AdapterMismatchError, about, warn
from .._shapes import base_shape, blank_rows, check_held, complete
from .._tree import (
    Held,
    Row,
    absent,
    all_arrays,
    arrays_of,
    filled,
    frozen_of,
    is_array,
    leaves_of,
    near,
    pair_rows,
    param_leaves,
    settings_of,
    tunable_rows,
    with_leaves,
)
from .format import Content, Format, Rows
from .source import check_any

_PREFIX = "lorax."
FORMAT_KEY, _VERSION, _ADAPTER, _BASE, _HELD = (
    _PREFIX + key for key in ("format", "version", "adapter", "base", "held")
)
_FORMATS = ("1", "2")
_SHORT = reprlib.Repr()  # settings of strangers may be nested without end
_SHORT.maxdict = _SHORT.maxstring = 64
_FIRST_KINDS = ("full", "lora")  # all that the first format has


def save_adapter(
    path: str | os.PathLike[str],
    tunable: Any,
    *,
    base: Any = None,
    hash_base: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Writes a tunable tree, or a pair, to one safetensors file, whole or not at all.

    The file is written beside the old one, flushed, read back, compared, and only then put in its
    place. Arrays that live on several devices or hosts are gathered one after the other; every
    process calls this, the first one writes, and the others wait for it.

    Args:
        path: the file.
        tunable: the second tree of `lorax.init_lora`, trained or not; or the whole `lorax.Pair`, of
            which the file also has the frozen factors that a kind of adapter keeps beside its base.
            A kind that cannot compute these from the base needs the pair. The bases themselves are
            not written.
        base: the parameters the adapter belongs to, or the frozen tree. The file keeps a
            fingerprint of their paths, shapes and dtypes, so that it is not loaded onto another
            model.
        hash_base: whether the fingerprint is of the base's numbers, too. This reads all of them.
        metadata: further strings for the file's header. Keys that begin with `lorax.` are taken.

        progress: whether a bar is shown on a terminal where it takes long.

    Raises:
        AdapterError: where two parameters share a path, an array holds NaN, infinity or a type
            that the format has not, or a kind of adapter needs the pair.

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
    with about(path), bars(progress):
        rows, held = pair_rows(tunable)
        write(path, rows, held, base=base, hash_base=hash_base, metadata=metadata)


def write(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    held: Held,
    *,
    base: Any = None,
    hash_base: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes rows and the frozen factors beside their bases."""
    arrays: dict[str, Any] = {}
    for row in rows:
        if isinstance(row.leaf, Adapter):
            check_held(row.path, row.leaf, held.get(row.path, {}))
        for name, array in arrays_of(*row, held.get(row.path)).items():
            if name in arrays:
                raise AdapterError(f"two arrays are both called `{name}`; rename one.")
            check_dtype(name, array.dtype)
            arrays[name] = array
    if taken := [key for key in metadata or {} if key.startswith(_PREFIX)]:
        raise AdapterError(f"metadata keys may not begin with {_PREFIX!r}: {taken}.")
    settings = {row.path: settings_of(row.leaf) for row in rows}
    is_first = not held and all(found["kind"] in _FIRST_KINDS for found in settings.values())
    header = {
        **(metadata or {}),
        FORMAT_KEY: "1" if is_first else "2",
        _VERSION: importlib.metadata.version("lorax-io"),
        _ADAPTER: json.dumps(settings),
    }
    if held:
        header[_HELD] = json.dumps({of: sorted(factors) for of, factors in held.items()})
    if base is not None:
        header[_BASE] = json.dumps(_fingerprint(base, dict(rows), hash_base))
    gathered = {name: to_host(array) for name, array in track(arrays.items(), "Saving the adapter")}
    with one_writer() as writer:
        if writer:
            write_tensors(path, gathered, header)


def load_adapter(
    path: str | os.PathLike[str],
    *,
    params: Any = None,
    like: Any = None,
    sharding: Any = None,
    progress: bool = True,
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
        progress: whether a bar is shown on a terminal where it takes long.

    Returns:
        The tunable tree, for `(frozen, tunable)`. `load_pair` returns both.

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
        >>> lorax_io.load_adapter(file, params=jax.eval_shape(lambda: params))["kernel"].rank
        2
    """
    if (params is None) == (like is None):
        raise TypeError("load_adapter needs `params` or `like`: one of them, and not both.")
    if like is None:
        with bars(progress):
            found = read(path, params, sharding, with_held=False)
        return with_leaves(found.structure, found.leaves, found.rows)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars(progress))
        with all_read(like, sharding):
            file = stack.enter_context(TensorFile(path))
            rows = _fit_like(file, read_header(file), like)
            leaves, structure = leaves_of(like)
            places = placements(rows, {}, structure, leaves, sharding)
        with all_read(like, sharding):
            rows, _ = _load(file, rows, {}, places)
    tree = with_leaves(structure, leaves, rows)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def load_pair(
    path: str | os.PathLike[str], params: Any, *, sharding: Any = None, progress: bool = True
) -> Pair:
    """Reads a file of `save_adapter` as the pair that a model runs on.

    Args:
        path: the file.
        params: the base's parameters, of arrays or `jax.ShapeDtypeStruct`.
        sharding: where to put the arrays, as in `load_adapter`.
        progress: whether a bar is shown on a terminal where it takes long.

    Returns:
        The `lorax.Pair`: `frozen` has the arrays of `params`, not copies of them, and beside them
        the frozen factors that a kind of adapter needs: those of the file, or else computed from
        the base, as the norms of DoRA.

    Raises:
        AdapterError: as in `load_adapter`; and where a kind needs frozen factors that the file does
            not have and that do not follow from the base.

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
        found = read(path, params, sharding, with_held=True)
    return Pair(
        frozen_of(found.leaves, found.structure, found.rows, found.held),
        with_leaves(found.structure, found.leaves, found.rows),
    )


class Found(NamedTuple):
    """What a file has for some parameters, and these."""

    rows: dict[str, Any]
    held: Held
    leaves: Mapping[str, Any]
    structure: Any


def read(
    path: str | os.PathLike[str], params: Any, sharding: Any = None, *, with_held: bool
) -> Found:
    """The rows of a file beside their bases, with or without the frozen factors there."""
    with contextlib.ExitStack() as stack:
        with all_read(params, sharding):
            file = stack.enter_context(TensorFile(path))
            leaves, structure = param_leaves(params)
            rows, held = _fit_params(file, read_header(file), leaves)
            places = placements(rows, held, structure, leaves, sharding)
        with all_read(params, sharding):
            _check_base(file, params, rows)  # this may gather the base from all processes
            rows, held = _load(file, rows, held if with_held else {}, places)
            if with_held:
                weights = {p: row for p, row in rows.items() if isinstance(row, Adapter)}
                held = {
                    p: complete(p, weight, leaves[p], held.get(p, {}))
                    for p, weight in weights.items()
                }
    return Found(rows, held, leaves, structure)


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


def load_alone(file: TensorFile) -> tuple[dict[str, Any], Held]:
    """The rows of a native file and the frozen factors in it, without a base to fit them to."""
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
        except ValueError as error:
            raise AdapterFileError(
                f"has factors of `{path}` that do not fit its axes: {error}."
            ) from error
    held = {
        path: {name: shapes[f"{path}/{name}"] for name in names}
        for path, names in header.held.items()
    }
    return _load(file, rows, held, dict.fromkeys(file.entries))


def _recognizes(content: Content) -> bool:
    return FORMAT_KEY in content.file.metadata


def _read_alone(content: Content) -> Rows:
    check_any({name: entry.shape for name, entry in content.file.entries.items()})
    return Rows(*load_alone(content.file))


FORMAT = Format(
    "native",
    "a native file",
    _recognizes,
    _read_alone,
    "lorax_io.load_adapter(path, params=params)",
)


def _load(
    file: TensorFile, rows: Mapping[str, Any], held: Held, places: Mapping[str, Any]
) -> tuple[dict[str, Any], Held]:
    """The rows and the frozen factors, with their arrays."""

    def load(name: str) -> jax.Array:
        view = file.view(name)

        def read(index: Any) -> np.ndarray[Any, Any]:
            part = np.array(view[index])  # a copy: the file may be replaced while the array lives
            check_finite(name, part)
            return part

        return place(view.shape, view.dtype, read, places[name])

    wanted = all_arrays(rows, held)
    names = [name for name in file.entries if name in wanted]
    arrays = {name: load(name) for name in track(names, "Loading the adapter")}
    return (
        {path: filled(path, row, arrays) for path, row in rows.items()},
        {path: {n: arrays[f"{path}/{n}"] for n in factors} for path, factors in held.items()},
    )


def _check_format(file: TensorFile) -> None:
    found = file.metadata.get(FORMAT_KEY)
    if found in _FORMATS:
        return
    raise AdapterFileError(
        "is a safetensors file, but no native adapter; `load_peft` reads the folders of PEFT."
        if found is None
        else f"is a native adapter of format {found!r}; this version of lorax-io reads formats 1 "
        "and 2. Update it.",
    )


class Header(NamedTuple):
    """What a header says: an adapter without arrays, or None where a parameter is trained in full.

    `held` names the frozen factors that the file has.
    """

    blanks: dict[str, Adapter | None]
    held: dict[str, list[str]]


def read_header(file: TensorFile) -> Header:
    """What the header says of each parameter, with a tensor for each of its names."""
    _check_format(file)
    found = _object(file, _ADAPTER)
    blanks = {path: _read_settings(path, settings) for path, settings in found.items()}
    held = _object(file, _HELD) if _HELD in file.metadata else {}
    for path, names in held.items():
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if blanks.get(path) is None or not is_list:
            raise AdapterFileError(f"its header has no frozen factors of `{path}`: {names!r}.")
    wanted: set[str] = set()
    for path, blank in blanks.items():
        factors = [] if blank is None else [*blank.factors(), *held.get(path, ())]
        for name in [path] if blank is None else [f"{path}/{factor}" for factor in factors]:
            if name in wanted:
                raise AdapterFileError(f"its header has two uses for `{name}`.")
            wanted.add(name)
    if missing := sorted(wanted - file.entries.keys()):
        raise AdapterFileError(f"lacks the tensor `{missing[0]}` of its header.")
    if extra := sorted(file.entries.keys() - wanted):
        raise AdapterFileError(f"has a tensor `{extra[0]}` that its header knows not.")
    return Header(blanks, held)


def _object(file: TensorFile, key: str) -> dict[str, Any]:
    found = parse_json(file.metadata.get(key, ""))
    if not isinstance(found, dict):
        raise AdapterFileError(f"its header has no object under {key!r}.")
    return found


def _read_settings(path: str, settings: Any) -> Adapter | None:
    if settings == {"kind": "full"}:
        return None
    try:
        return adapter_from_settings(settings)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(
            f"its header says of `{path}` what is no setting: {_SHORT.repr(settings)}."
        ) from error


def _fit_params(
    file: TensorFile, header: Header, leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], Held]:
    """Rows of shapes beside their bases, and the frozen factors that the file has."""
    weights = {path: blank for path, blank in header.blanks.items() if blank is not None}
    blanks, beside = blank_rows(leaves, weights)
    rows: dict[str, Any] = {}
    for path, blank in header.blanks.items():
        base = leaves.get(path)
        if blank is not None:
            rows[path] = blanks[path]
        elif is_array(base):
            rows[path] = shape_of(base)
        else:
            raise AdapterMismatchError(f"trains `{path}` in full, {absent(path, leaves)}")
    for path, names in header.held.items():
        if unknown := sorted(set(names) - beside[path].keys()):
            raise AdapterFileError(
                f"has a frozen factor `{path}/{unknown[0]}`, which a {weights[path].kind} adapter "
                "does not have.",
            )
    held = {path: {n: beside[path][n] for n in names} for path, names in header.held.items()}
    _check_entries(file, all_arrays(rows, held))
    return rows, held


def _fit_like(file: TensorFile, header: Header, like: Any) -> dict[str, Any]:
    """Rows of shapes as those of a tree."""
    wanted, blanks = dict(tunable_rows(like)), header.blanks
    if unknown := sorted(blanks.keys() - wanted.keys()):
        raise AdapterMismatchError(
            f"has `{unknown[0]}`, which `like` has not.{near(unknown[0], wanted)}"
        )
    if missing := sorted(wanted.keys() - blanks.keys()):
        raise AdapterMismatchError(
            f"lacks `{missing[0]}`, which `like` has.{near(missing[0], blanks)}"
        )
    for path, leaf in wanted.items():
        settings = settings_of(blanks[path])
        if settings != settings_of(leaf):
            raise AdapterMismatchError(
                f"has `{path}` with {settings}, but `like` has {settings_of(leaf)}."
            )
    for name, array in all_arrays(wanted).items():
        if file.entries[name].dtype != array.dtype:
            raise AdapterMismatchError(
                f"has `{name}` in {file.entries[name].dtype}, but `like` has {array.dtype}.",
            )
    rows = {path: jax.tree.map(shape_of, leaf) for path, leaf in wanted.items()}
    _check_entries(file, all_arrays(rows))
    return rows


def _check_entries(file: TensorFile, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        entry = file.entries[name]
        if entry.shape != array.shape:
            raise AdapterMismatchError(
                f"has `{name}` of shape {entry.shape}, but {array.shape} would fit."
            )
        check_width(name, entry.dtype)


def _fingerprint(base: Any, rows: Mapping[str, Any], content: bool) -> dict[str, str]:
    """Hashes of the base's paths with their shapes, with their dtypes, and of its numbers.

    A parameter that is trained in full is in the adapter itself: its shape counts, its numbers do
    not, and the base may be the frozen tree that has None there.
    """
    leaves, _ = param_leaves(base)
    full = {path: leaf for path, leaf in rows.items() if not isinstance(leaf, Adapter)}
    if absent_rows := sorted(rows.keys() - leaves.keys()):
        raise AdapterMismatchError(f"adapts `{absent_rows[0]}`, {absent(absent_rows[0], leaves)}")
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
    saved = parse_json(file.metadata[_BASE])
    if not isinstance(saved, dict):
        raise AdapterFileError(f"its header has no object under {_BASE!r}.")
    # The numbers can be compared only where there are some.
    numbers = all(
        isinstance(leaf, jax.Array | np.ndarray)
        for leaf in param_leaves(params)[0].values()
        if is_array(leaf)
    )
    found = _fingerprint(params, rows, "content" in saved and numbers)
    other = [key for key, value in found.items() if saved.get(key) != value]
    if other == ["dtypes"]:
        warn("was saved for a base of the same shapes in other dtypes.")
    elif other:
        raise AdapterMismatchError(
            f"belongs to another base: the parameters have other {' and '.join(other)} than those "
            "it was saved for. Load it onto the base that it was trained on.",
        )

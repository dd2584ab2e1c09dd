"""The native format: one safetensors file, one entry for each array of the tunable tree.

An entry is named by its path in the tree, joined by `/`; a LoRA weight at `h/0/attn/kernel` is the
two entries `h/0/attn/kernel/a` and `h/0/attn/kernel/b`. What shapes a delta without being an array
(rank, alpha, scaling, axes) is JSON in the file's header and is compared on load: the same factors
under another alpha are another adapter.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lorax import LoraWeight, LoraxError

_FORMAT, _SETTINGS = "lorax.format", "lorax.settings"
# What safetensors can write *and* read back through numpy; it writes 8-bit floats but fails on them
# when reading (seen with 0.8.0).
_DTYPES = frozenset(
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64"
    " float16 bfloat16 float32 float64 complex64".split()
)


class AdapterFileError(LoraxError, ValueError):
    """An adapter that cannot be written, or a file that is not the adapter asked for."""


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(tunable: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays by name, and the settings of each LoRA weight by name."""
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tunable):
        name = _name(path)
        if name in arrays:
            raise AdapterFileError(f"two parameters are both named {name!r}; rename one of them")
        if str(getattr(leaf, "dtype", type(leaf).__name__)) not in _DTYPES:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise AdapterFileError(f"{name!r} is {kind}, which a safetensors file cannot hold")
        arrays[name] = leaf
    if not arrays:
        raise AdapterFileError("the tunable tree holds no array: every parameter in it is frozen")

    settings: dict[str, Any] = {}
    is_weight = lambda x: isinstance(x, LoraWeight)  # noqa: E731
    for path, weight in jax.tree_util.tree_leaves_with_path(tunable, is_leaf=is_weight):
        if isinstance(weight, LoraWeight):
            fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
            static = {k: v for k, v in fields.items() if k not in ("a", "b")}
            settings[_name(path)] = json.loads(json.dumps(static))  # tuples compare as lists
    return arrays, settings


def save_adapter(
    path: str | os.PathLike[str], tunable: Any, *, metadata: dict[str, str] | None = None
) -> None:
    """Writes a tunable tree to one safetensors file, whole or not at all.

    Args:
        path: The file to write; an older one is replaced only when the new one is complete.
        tunable: The second tree of `lorax.init_lora`, trained or not.
        metadata: Further strings for the file's header, such as the name of the base model. Keys
            that start with `lorax.` are taken.

    Raises:
        AdapterFileError: The tree is empty, two parameters share a name, or an array has a dtype
            that the file cannot hold.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, lorax_io, pathlib, tempfile
        >>> params = {"kernel": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"kernel": 2}, jax.random.PRNGKey(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> lorax_io.save_adapter(file, tunable, metadata={"base": "my-model"})
        >>> lorax_io.read_metadata(file)
        {'base': 'my-model'}
        >>> tunable = lorax_io.load_adapter(file, like=tunable)
    """
    arrays, settings = _describe(tunable)
    if taken := [key for key in metadata or {} if key.startswith("lorax.")]:
        raise AdapterFileError(f"metadata keys may not start with 'lorax.': {taken}")
    header = {**(metadata or {}), _FORMAT: "1", _SETTINGS: json.dumps(settings, sort_keys=True)}
    # C order matters: safetensors writes the memory as it lies, so a transposed view would come
    # back with its values in the wrong places. (ascontiguousarray would turn scalars into vectors.)
    data = {name: np.asarray(jax.device_get(x), order="C") for name, x in arrays.items()}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(unfinished, "xb") as file:
            file.write(safetensors.numpy.save(data, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_adapter(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads a file of `save_adapter` into a tree like the one given.

    Args:
        path: The file.
        like: A tunable tree of the same structure, with arrays or `jax.ShapeDtypeStruct` in it:
            what `lorax.init_lora` returns for the same parameters and spec, or `jax.eval_shape` of
            it.

    Returns:
        `like` with its arrays replaced by those of the file.

    Raises:
        AdapterFileError: The file is not in the native format, or its entries, shapes, dtypes and
            settings are not exactly those of `like`; the message names the first that differs.
    """
    arrays, settings = _describe(like)
    with _open(path) as (file, header):
        data: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
    for name in sorted(arrays.keys() | data.keys()):
        if name not in data:
            raise AdapterFileError(f"{path}: no entry {name!r}, which the tree asks for")
        if name not in arrays:
            raise AdapterFileError(f"{path}: the tree has no place for the entry {name!r}")
        found, wanted = ((x.shape, str(x.dtype)) for x in (data[name], arrays[name]))
        if found != wanted:
            raise AdapterFileError(f"{path}: {name!r} is {found}, but the tree asks for {wanted}")
    stored = json.loads(header[_SETTINGS])
    for name, wanted in settings.items():
        if stored.get(name) != wanted:
            raise AdapterFileError(
                f"{path}: {name!r} was saved with {stored.get(name)}, but the tree has {wanted}"
            )
    return jax.tree_util.tree_map_with_path(lambda p, _: jnp.asarray(data[_name(p)]), like)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the `metadata` that `save_adapter` was given."""
    with _open(path) as (_, header):
        return {key: value for key, value in header.items() if not key.startswith("lorax.")}


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Generator[tuple[Any, dict[str, str]]]:
    """Opens a native file; yields it with its header."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{path}: not a safetensors file ({error})") from error
    with file:
        header = file.metadata() or {}
        if header.get(_FORMAT) != "1":
            raise AdapterFileError(
                f"{path}: not a native Lorax adapter of format 1"
                f" (its header says {_FORMAT}={header.get(_FORMAT)!r})"
            )
        yield file, header

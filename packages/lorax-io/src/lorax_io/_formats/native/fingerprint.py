"""A fingerprint of the base that an adapter belongs to."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lorax import Adapter, QuantizedWeight

from ..._disk.arrays import to_host
from ..._disk.progress import track
from ..._disk.tensors import (
    TensorFile,
    parse_json,
)
from ..._errors import AdapterFileError, AdapterMismatchError, warn
from ..._tree import (
    absent,
    is_array,
    param_leaves,
)
from .header import BASE


def fingerprint(base: Any, rows: Mapping[str, Any], content: bool) -> dict[str, str]:
    """Hashes of the base's paths and shapes, of its paths and dtypes, and, optionally, its numbers.

    The values of a parameter that is trained in full are not hashed, since they are in the adapter.
    The base may be the frozen tree, which has None in its place.
    """
    leaves, _ = param_leaves(base)
    full = {path: leaf for path, leaf in rows.items() if not isinstance(leaf, Adapter)}
    if absent_rows := sorted(rows.keys() - leaves.keys()):
        raise AdapterMismatchError(f"adapts `{absent_rows[0]}`, {absent(absent_rows[0], leaves)}")
    arrays = {path: leaf for path, leaf in {**leaves, **full}.items() if is_array(leaf)}
    hashes = {
        "shapes": _hash(f"{path} {list(arrays[path].shape)}" for path in sorted(arrays)),
        "dtypes": _hash(f"{path} {arrays[path].dtype}" for path in sorted(arrays)),
    }
    if content:
        digest = hashlib.sha256()
        for path in track(sorted(arrays.keys() - full.keys()), "Hashing the base"):
            digest.update(path.encode())
            for array in _parts(arrays[path]):
                numbers = np.asarray(to_host(array), order="C")
                digest.update(numbers.reshape(-1).view(np.uint8).data)
        hashes["content"] = digest.hexdigest()
    return hashes


def _parts(leaf: Any) -> list[Any]:
    """The arrays of a base: one, or several if it is quantized."""
    return [leaf.arrays[n] for n in leaf.names] if isinstance(leaf, QuantizedWeight) else [leaf]


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_base(file: TensorFile, params: Any, rows: Mapping[str, Any]) -> None:
    """Rejects a base other than the one that was saved; warns if only its dtypes differ."""
    if BASE not in file.metadata:
        return
    saved = parse_json(file.metadata[BASE])
    if not isinstance(saved, dict):
        raise AdapterFileError(f"its header has no object under {BASE!r}.")
    # The numbers can be compared only where there are some.
    numbers = all(
        isinstance(array, jax.Array | np.ndarray)
        for leaf in param_leaves(params)[0].values()
        if is_array(leaf)
        for array in _parts(leaf)
    )
    hashes = fingerprint(params, rows, "content" in saved and numbers)
    other = [key for key, value in hashes.items() if saved.get(key) != value]
    if other == ["dtypes"]:
        warn("was saved for a base of the same shapes in other dtypes.")
    elif other:
        raise AdapterMismatchError(
            f"belongs to another base: the parameters have other {' and '.join(other)} than those "
            "it was saved for. Load it onto the base that it was trained on.",
        )

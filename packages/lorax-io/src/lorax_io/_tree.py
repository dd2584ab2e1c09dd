"""Tunable trees as rows: one for each trained parameter, named by its path."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import Adapter, FrozenWeight, Pair, QuantizedWeight, path_string

from ._errors import AdapterError, AdapterMismatchError

# Frozen factors, which are stored with their adapter's base: by path of the base, then by name.
FrozenFactors = Mapping[str, Mapping[str, Any]]


class Row(NamedTuple):
    """One trained parameter: its adapter, or the array itself if it is trained in full."""

    path: str
    leaf: Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def rows_of(tunable: Any) -> list[Row]:
    """The rows of a tree with the structure of a tunable one; its leaves are not checked."""
    leaves = jax.tree_util.tree_leaves_with_path(tunable, is_leaf=_is_weight)
    return [_row(path, leaf) for path, leaf in leaves]


def _row(path: tuple[Any, ...], leaf: Any) -> Row:
    """One row, named by the path of its base.

    If Flax boxes the base (`nn.Partitioned`), `init_lora` boxes each factor, not the adapter.
    """
    factors = leaf.factors() if isinstance(leaf, Adapter) else {}
    if jax.tree_util.all_leaves(factors.values()):
        return Row(path_string(path), leaf)
    inside: Any = ()
    for name, box in factors.items():
        [(inside, factors[name])] = jax.tree_util.tree_leaves_with_path(box)
    return Row(path_string((*path, *inside)), leaf.with_factors(factors))


def pair_rows(tree: Any) -> tuple[list[Row], FrozenFactors]:
    """The rows of a tunable tree or of a `Pair`, and the frozen factors of a `Pair`."""
    if not isinstance(tree, Pair):
        return tunable_rows(tree), {}
    leaves, _ = frozen_leaves(tree.frozen)
    rows = tunable_rows(tree.tunable)
    for path, leaf in rows:
        if isinstance(leaf, Adapter) and not is_array(base_of(leaves.get(path))):
            raise AdapterMismatchError(f"adapts `{path}`, {absent(path, leaves)}")
    adapted = [path for path, leaf in rows if isinstance(leaf, Adapter)]
    frozen = {path: leaves[path] for path in adapted}
    return rows, {p: x.factors for p, x in frozen.items() if isinstance(x, FrozenWeight)}


def _check_scale(path: str, leaf: Any) -> None:
    """Rejects an adapter whose scale is not a finite number, which no file can hold."""
    for weight in (leaf, getattr(leaf, "delta", None)):
        if not isinstance(weight, Adapter):
            continue
        try:
            is_finite = math.isfinite(weight.scale)
        except (TypeError, ValueError, ArithmeticError):
            is_finite = False
        if not is_finite:
            alpha = repr(getattr(weight, "alpha", None))
            raise AdapterError(f"`{path}` has alpha {alpha:.40}, which is not a finite number.")


def tunable_rows(tunable: Any) -> list[Row]:
    """The checked rows of a tunable tree of arrays or shapes."""
    if _is_pair(tunable):
        raise AdapterError(
            "got the pair (frozen, tunable); pass only the tunable tree. (A native file also "
            "accepts a `lorax.Pair`. If this is one tree of two parts, one trained in full and "
            "one adapted, pass it as a list.)",
        )
    rows = rows_of(tunable)
    seen: set[str] = set()
    for path, leaf in rows:
        if path in seen:
            raise AdapterError(f"two parameters are both called `{path}`; rename one.")
        seen.add(path)
        _check_scale(path, leaf)
        for name, array in arrays_of(path, leaf).items():
            _check_array(name, array)
    return rows


def _check_array(name: str, array: Any) -> None:
    if not is_array(array):
        raise AdapterError(f"`{name}` is {type(array).__name__}, not an array.")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise AdapterError(
            f"`{name}` holds PRNG keys; save `jax.random.key_data` of them elsewhere."
        )


def _is_pair(tree: Any) -> bool:
    """Whether a tree is a (frozen, tunable) pair, in either order.

    It is if both trees have the same structure, and every adapter has an array in the other tree.
    """
    if not (type(tree) is tuple or isinstance(tree, Pair)) or len(tree) != 2:
        return False
    (left, one), (right, other) = (jax.tree.flatten(part, is_leaf=_is_leaf) for part in tree)
    if one != other:
        return False
    sides = (zip(left, right, strict=True), zip(right, left, strict=True))
    bases = [leaf for side in sides for leaf, row in side if _is_weight(row)]
    return bool(bases) and all(map(is_array, bases))


def _is_weight(node: Any) -> bool:
    return isinstance(node, Adapter)


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, Adapter | FrozenWeight | QuantizedWeight)


def arrays_of(path: str, leaf: Any, frozen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arrays of a row by name: `path/a` and `path/b` for LoRA, `path` if trained in full."""
    if isinstance(leaf, Adapter):
        factors = {**leaf.factors(), **(frozen or {})}
        return {f"{path}/{name}": factor for name, factor in factors.items()}
    return {path: leaf}


def all_arrays(rows: Mapping[str, Any], frozen: FrozenFactors | None = None) -> dict[str, Any]:
    """The arrays of all rows by name, including frozen factors."""
    frozen = frozen or {}
    return {
        name: array
        for path, leaf in rows.items()
        for name, array in arrays_of(path, leaf, frozen.get(path)).items()
    }


def param_leaves(params: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a parameter tree by path, including None, and its structure.

    The leaves of a frozen tree are its bases, without frozen factors.
    """
    leaves, structure = frozen_leaves(params)
    return {path: base_of(leaf) for path, leaf in leaves.items()}, structure


def frozen_leaves(frozen: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a frozen tree by path, each `FrozenWeight` whole, and its structure."""
    leaves, structure = leaves_of(frozen)
    for path, leaf in leaves.items():
        if _is_weight(leaf):
            raise AdapterError(
                f"have an adapter at `{path}`: this is a tunable tree, or a pair. Give the "
                "parameters of the base, or the frozen tree.",
                "the parameters",
            )
    return leaves, structure


def base_of(leaf: Any) -> Any:
    """The base of a leaf of the frozen tree."""
    return leaf.base if isinstance(leaf, FrozenWeight) else leaf


def leaves_of(params: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree of parameters or adapters by path, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)
    rows = [_row(path, leaf) for path, leaf in leaves]
    by_path = {row.path: row.leaf for row in rows}
    if len(by_path) < len(leaves):
        [(path, _)] = Counter(row.path for row in rows).most_common(1)
        raise AdapterError(f"two parameters are both called `{path}`; rename one.", "the tree")
    return by_path, structure


def absent(path: str, leaves: Mapping[str, Any]) -> str:
    if path in leaves:
        return f"which is {type(leaves[path]).__name__} in the parameters, not an array."
    return f"which is not in the parameters.{suggestion(path, leaves)}"


def suggestion(name: str, names: Any) -> str:
    """The sentence `Did you mean …?` with the closest name, or the empty string."""
    import difflib  # only needed for error messages

    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def with_leaves(structure: Any, paths: Any, rows: Mapping[str, Any]) -> Any:
    """The tree of these rows, with None at all other paths."""
    return jax.tree.unflatten(structure, [rows.get(path) for path in paths])


def filled(path: str, row: Any, arrays: Mapping[str, Any]) -> Any:
    """A row with its arrays taken from `arrays`, by name."""
    if isinstance(row, Adapter):
        return row.with_factors({name: arrays[f"{path}/{name}"] for name in row.factors()})
    return arrays[path]


def frozen_of(
    leaves: Mapping[str, Any], structure: Any, rows: Mapping[str, Any], frozen: FrozenFactors
) -> Any:
    """The frozen tree that belongs to these rows: None where a parameter is trained in full."""
    full = {path for path, leaf in rows.items() if not isinstance(leaf, Adapter)}
    return jax.tree.unflatten(
        structure,
        [
            None if path in full else frozen_leaf(leaf, frozen.get(path), rows.get(path))
            for path, leaf in leaves.items()
        ],
    )


def frozen_leaf(base: Any, frozen: Mapping[str, Any] | None, row: Any) -> Any:
    """The leaf of the frozen tree: the base, or a `FrozenWeight` if it has frozen factors."""
    return FrozenWeight.beside(base, frozen, row) if frozen else base


def settings_of(leaf: Any) -> dict[str, Any]:
    """The settings of a row as JSON data; its kind is `full` if it is not an adapter."""
    return leaf.settings() if isinstance(leaf, Adapter) else {"kind": "full"}

"""Tunable trees as rows: one for each parameter that is trained, named by its path."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import LoraSpec, LoraWeight, Pair, init_lora

from ._errors import AdapterError, AdapterMismatchError


class Row(NamedTuple):
    """One parameter that is trained: a `LoraWeight`, or the array itself."""

    path: str
    leaf: Any


def path_string(key_path: Any) -> str:
    """`h/0/attn/c_attn/kernel`, as in all of Lorax."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/") or "."


def is_array(leaf: Any) -> bool:
    """Whether a leaf has numbers, or the shape of some."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def rows_of(tunable: Any) -> list[Row]:
    """The rows of a tree with the structure of a tunable one, whatever its leaves are."""
    leaves = jax.tree_util.tree_leaves_with_path(tunable, is_leaf=_is_weight)
    return [_row(path, leaf) for path, leaf in leaves]


def _row(path: tuple[Any, ...], leaf: Any) -> Row:
    """One row, by the path of its base.

    Where Flax has boxed the base, `init_lora` boxes each factor instead of the adapter.
    """
    if not isinstance(leaf, LoraWeight) or jax.tree_util.all_leaves([leaf.a, leaf.b]):
        return Row(path_string(path), leaf)
    [(inside, a)], [(_, b)] = map(jax.tree_util.tree_leaves_with_path, (leaf.a, leaf.b))
    return Row(path_string((*path, *inside)), dataclasses.replace(leaf, a=a, b=b))


def tunable_rows(file: object, tunable: Any) -> list[Row]:
    """The rows of a tunable tree, of arrays or shapes."""
    if _is_pair(tunable):
        raise AdapterError(
            file,
            "was given the pair (frozen, tunable); give it the tunable tree alone. (If it is a "
            "tree of two parts, one trained in full and one adapted, give it as a list.)",
        )
    rows = rows_of(tunable)
    seen: set[str] = set()
    for path, leaf in rows:
        if path in seen:
            raise AdapterError(file, f"two parameters are both called `{path}`; rename one.")
        seen.add(path)
        for name, array in arrays_of(path, leaf).items():
            if not is_array(array):
                raise AdapterError(file, f"`{name}` is {type(array).__name__}, not an array.")
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                raise AdapterError(
                    file, f"`{name}` holds PRNG keys; save `jax.random.key_data` of them elsewhere."
                )
    return rows


def _is_pair(tree: Any) -> bool:
    """Whether a tree is a pair in either order: every adapter has its base beside it."""
    if not (type(tree) is tuple or isinstance(tree, Pair)) or len(tree) != 2:
        return False
    is_leaf = lambda node: node is None or _is_weight(node)  # noqa: E731
    (left, one), (right, other) = (jax.tree.flatten(half, is_leaf=is_leaf) for half in tree)
    if one != other:
        return False
    sides = (zip(left, right, strict=True), zip(right, left, strict=True))
    beside = [leaf for side in sides for leaf, row in side if _is_weight(row)]
    return bool(beside) and all(map(is_array, beside))


def _is_weight(node: Any) -> bool:
    return isinstance(node, LoraWeight)


def arrays_of(path: str, leaf: Any) -> dict[str, Any]:
    """The arrays of a row by name: `path/a` and `path/b`, or `path` alone."""
    if isinstance(leaf, LoraWeight):
        return {f"{path}/a": leaf.a, f"{path}/b": leaf.b}
    return {path: leaf}


def all_arrays(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of all rows by name."""
    return {
        name: array for path, leaf in rows.items() for name, array in arrays_of(path, leaf).items()
    }


def param_leaves(params: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a parameter tree by path, None among them, and its structure."""
    leaves, structure = leaves_of(params)
    for path, leaf in leaves.items():
        if _is_weight(leaf):
            raise AdapterError(
                "the parameters",
                f"have an adapter at `{path}`: this is a tunable tree, or a pair. Give the "
                "parameters of the base, or the frozen tree.",
            )
    return leaves, structure


def leaves_of(params: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree of parameters or adapters by path, and its structure."""
    is_leaf = lambda node: node is None or _is_weight(node)  # noqa: E731
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    rows = [_row(path, leaf) for path, leaf in leaves]
    found = {row.path: row.leaf for row in rows}
    if len(found) < len(leaves):
        [(path, _)] = Counter(row.path for row in rows).most_common(1)
        raise AdapterError("the tree", f"two parameters are both called `{path}`; rename one.")
    return found, structure


def blank_weights(
    file: object, leaves: Mapping[str, Any], specs: Mapping[str, LoraSpec]
) -> dict[str, LoraWeight]:
    """Adapters of shapes alone, as `init_lora` would make them for these parameters.

    It is `init_lora` that knows which specs fit a parameter, and which shapes the factors have.
    """
    for path in specs:
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(file, f"adapts `{path}`, {absent(path, leaves)}")
    # In double precision only where JAX has it, which else warns. The file says the factors' types.
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
        for path, leaf in ((path, leaves[path]) for path in specs)
    }
    # Of rank one: `init_lora` refuses more than a matrix can have, and PEFT gives the rank of all
    # modules to a router of few experts, too.
    ones = {path: dataclasses.replace(spec, rank=1) for path, spec in specs.items()}
    try:
        weights = jax.eval_shape(lambda: init_lora(shapes, ones, jax.random.key(0))[1])
    except ValueError as error:
        raise AdapterMismatchError(file, str(error)) from error
    return {path: _with_rank(weight, specs[path].rank) for path, weight in weights.items()}


def _with_rank(weight: LoraWeight, rank: int) -> LoraWeight:
    """The same with factors of another rank."""

    def factor(shape: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        sizes = (*shape.shape[:axis], rank, *shape.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(sizes, shape.dtype)

    a = factor(weight.a, weight.a.ndim - 1)
    b = factor(weight.b, len(weight.shared_axes))
    return dataclasses.replace(weight, a=a, b=b, rank=rank)


def base_shape(
    a: tuple[int, ...], b: tuple[int, ...], axes: LoraWeight | LoraSpec
) -> tuple[int, ...] | None:
    """The shape of the base that factors of these shapes fit; None where they fit none."""
    shared, inputs, outputs = (
        tuple(group or ()) for group in (axes.shared_axes, axes.in_axes, axes.out_axes)
    )
    sizes = dict(zip((*shared, *inputs, *outputs), (*a[:-1], *b[len(shared) + 1 :]), strict=False))
    if sorted(sizes) != list(range(len(a) + len(b) - len(shared) - 2)):
        return None
    return tuple(sizes[d] for d in sorted(sizes))


def absent(path: str, leaves: Mapping[str, Any]) -> str:
    if path in leaves:
        return f"which is {type(leaves[path]).__name__} in the parameters, not an array."
    return f"which the parameters have not.{near(path, leaves)}"


def near(name: str, names: Any) -> str:
    """A sentence with the name that may have been meant, or the empty string."""
    import difflib  # only ever wanted on the way to an error

    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean `{found[0]}`?" if found else ""


def with_leaves(structure: Any, paths: Any, rows: Mapping[str, Any]) -> Any:
    """The tree with a row where there is one, and None elsewhere."""
    return jax.tree.unflatten(structure, [rows.get(path) for path in paths])


def filled(path: str, row: Any, arrays: Mapping[str, Any]) -> Any:
    """A row with the arrays of its names."""
    if isinstance(row, LoraWeight):
        return dataclasses.replace(row, a=arrays[f"{path}/a"], b=arrays[f"{path}/b"])
    return arrays[path]


def frozen_of(leaves: Mapping[str, Any], structure: Any, rows: Mapping[str, Any]) -> Any:
    """The frozen tree beside these rows: None where a parameter is trained in full."""
    full = {path for path, leaf in rows.items() if not isinstance(leaf, LoraWeight)}
    return jax.tree.unflatten(
        structure, [None if path in full else leaf for path, leaf in leaves.items()]
    )


def settings_of(leaf: Any) -> dict[str, Any]:
    """What shapes a delta without being an array, as JSON.

    Args:
        leaf: a `LoraWeight` or a `LoraSpec`; anything else is trained in full.
    """
    if not isinstance(leaf, LoraWeight | LoraSpec):
        return {"kind": "full"}
    fields = ("rank", "alpha", "scaling", "in_axes", "out_axes", "shared_axes")
    values = {name: getattr(leaf, name) for name in fields}
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"kind": "lora", **lists}

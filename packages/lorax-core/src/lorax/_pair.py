"""The pair `(frozen, tunable)`: two trees with the structure of the parameters.

Each leaf lives in one of them and is None in the other; under a `LoraWeight` in `tunable` the
base stands in `frozen`. Leaves that are not arrays stay in `frozen`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._boxes import bare, opened
from ._compat import is_tracer
from ._errors import PairError
from ._weight import LoraWeight


class Leaf(NamedTuple):
    """One parameter as the pair holds it."""

    path: str
    frozen: Any
    tunable: Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that a model computes with."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def own(leaf: Any) -> Any:
    """A copy of an array, placed as it is; anything else as it is.

    A training step that donates its state deletes these buffers, which must not be somebody
    else's. Tracers are copied too: `jax.vmap` returns an input that passes through it as it came.
    """
    if isinstance(leaf, np.ndarray):
        return np.array(leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    if not is_tracer(leaf) and not leaf.is_fully_addressable:
        # `device_put` takes no array that has parts in other processes.
        return jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
    return jax.device_put(leaf, may_alias=False)


def path_string(key_path: Any) -> str:
    """`h/0/attn/kernel` for the path of a leaf; `.` where the tree is the leaf."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/") or "."


def _is_frozen_leaf(node: Any) -> bool:
    return node is None


def is_tunable_leaf(node: Any) -> bool:
    """Whether a node of the tunable tree stands for one parameter."""
    return node is None or isinstance(node, LoraWeight)


def flatten_params(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a parameter tree with their paths, None among them, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_frozen_leaf)
    return [(path_string(path), leaf) for path, leaf in leaves], structure


def flatten_tunable(tunable: Any, params: Any, structure: Any) -> tuple[list[Any], Any]:
    """The leaves of a tunable tree, and `structure`, that of `params`, if it is the tree's too."""
    leaves, other = jax.tree.flatten(tunable, is_leaf=is_tunable_leaf)
    if other != structure:
        # Boxes are around the factors in one tree, and around the base in the other.
        without = jax.tree.structure(opened(tunable), is_leaf=is_tunable_leaf)
        if without == jax.tree.structure(opened(params), is_leaf=_is_frozen_leaf):
            other = structure
    return [bare(leaf) for leaf in leaves], other


def flatten_pair(frozen: Any, tunable: Any, what: str) -> tuple[list[Leaf], Any]:
    """The leaves of both trees side by side, and the structure of the parameters."""
    left, structure = flatten_params(frozen)
    right, other = flatten_tunable(tunable, frozen, structure)
    if structure != other:
        _check_order(frozen, tunable, what)
        raise PairError(
            f"{what}: frozen and tunable must both have the structure of the parameters, as "
            f"`init_lora` returns them, but frozen is {_brief(structure)} and tunable is "
            f"{_brief(other)}."
        )
    leaves = [Leaf(path, base, new) for (path, base), new in zip(left, right, strict=True)]
    for path, base, new in leaves:
        _check_leaf(what, path, base, new)
    return leaves, structure


def _check_order(frozen: Any, tunable: Any, what: str) -> None:
    if not has_adapters(frozen):
        return
    if has_adapters(tunable):
        raise PairError(
            f"{what}: both trees have adapters. A pair is (frozen, tunable), as `init_lora` "
            "returns it, and frozen has arrays alone."
        )
    raise PairError(
        f"{what}: frozen and tunable are swapped: the first tree has the adapters. A pair is "
        "(frozen, tunable), as `init_lora` returns it."
    )


def has_adapters(tree: Any) -> bool:
    """Whether a tree has an adapter anywhere, as the tunable one of a pair."""
    leaves = jax.tree.leaves(tree, is_leaf=is_tunable_leaf)
    return any(isinstance(leaf, LoraWeight) for leaf in leaves)


def _brief(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _check_leaf(what: str, path: str, base: Any, new: Any) -> None:
    if isinstance(new, LoraWeight):
        if not is_array(base):
            raise PairError(
                f"{what}: tunable has an adapter at `{path}`, but frozen has "
                f"{type(base).__name__} there instead of its base weight."
            )
        # Under vmap and in trees of shapes or specs, leaves may be anything with a shape.
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in (base, new.a, new.b)]
        expected = factor_shapes(shapes[0], new)
        if expected is None or shapes[1:] != list(expected):
            raise PairError(
                f"{what}: the adapter at `{path}` has a {shapes[1]} and b {shapes[2]}, which do "
                f"not fit a base of shape {shapes[0]} with in_axes={new.in_axes}, "
                f"out_axes={new.out_axes}, shared_axes={new.shared_axes} and rank {new.rank}."
            )
    elif base is not None and new is not None:
        raise PairError(
            f"{what}: `{path}` stands in frozen and in tunable. A parameter lives in one of them "
            "and is None in the other; only an adapter needs its base beside it."
        )


def factor_shapes(
    shape: tuple[int, ...], weight: LoraWeight
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of `a` and `b` for a base of `shape`, or None where the axes do not fit it."""
    shared, inputs, outputs = weight.axes
    if sorted((*shared, *inputs, *outputs)) != list(range(len(shape))):
        return None
    of = lambda axes: tuple(shape[d] for d in axes)  # noqa: E731
    return (*of(shared), *of(inputs), weight.rank), (*of(shared), weight.rank, *of(outputs))


def split_pair(value: Any, what: str) -> tuple[Any, Any]:
    """The two trees of a pair."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    raise PairError(
        f"{what} must be the pair (frozen, tunable) from `init_lora`, but it is "
        f"{type(value).__name__}."
    )


def combine(leaves: list[Leaf], structure: Any, adapted: Callable[[Leaf], Any]) -> Any:
    """The parameter tree, with `adapted(leaf)` where the pair has an adapter."""
    return jax.tree.unflatten(
        structure,
        [
            adapted(leaf)
            if isinstance(leaf.tunable, LoraWeight)
            else (leaf.frozen if leaf.tunable is None else leaf.tunable)
            for leaf in leaves
        ],
    )

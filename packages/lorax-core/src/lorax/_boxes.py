"""Boxes: nodes of one array in which Flax keeps the partition of a parameter beside it.

The box of a base names the base's axes. Its factors have other axes, so each has a box of its own.
Flax is not imported: a box is what has the methods of `flax.core.meta.AxisMetadata` and the
`names` of `flax.linen.Partitioned`, or is a `flax.nnx.Variable` with a partition.
"""

import dataclasses
from typing import Any

import jax

from ._weight import LoraWeight

# Flax 0.12 renamed `sharding_names`.
_NNX_KEYS = ("out_sharding", "sharding_names")


def _nnx_key(node: Any) -> str | None:
    if not hasattr(type(node), "from_metadata"):
        return None
    metadata = node.get_metadata()
    return next((key for key in _NNX_KEYS if metadata.get(key)), None)


def is_box(node: Any) -> bool:
    """Whether a node of a tree says how the array in it is partitioned."""
    if hasattr(type(node), "replace_boxed"):
        return hasattr(node, "names")
    return _nnx_key(node) is not None


def content(node: Any) -> Any:
    """What is in a box; any other node as it is."""
    if not is_box(node):
        return node
    [child] = jax.tree.leaves(node, is_leaf=lambda inner: inner is not node)
    return child


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, LoraWeight) or is_box(node)


def opened(tree: Any) -> Any:
    """A tree without its boxes."""
    return jax.tree.map(content, tree, is_leaf=_is_leaf)


def bare(leaf: Any) -> Any:
    """An adapter with its factors out of their boxes; any other leaf as it is."""
    if not isinstance(leaf, LoraWeight) or not (is_box(leaf.a) or is_box(leaf.b)):
        return leaf
    return dataclasses.replace(leaf, a=content(leaf.a), b=content(leaf.b))


def box_factors(tunable: Any) -> Any:
    """The tree with a box around each factor, in place of the base's around the adapter."""

    def boxed(node: Any) -> Any:
        weight = content(node)
        if not is_box(node) or not isinstance(weight, LoraWeight):
            return node
        shared, inputs, outputs = weight.axes
        a = _box_like(node, weight.a, (*shared, *inputs, None))
        b = _box_like(node, weight.b, (*shared, None, *outputs))
        return dataclasses.replace(weight, a=a, b=b)

    return jax.tree.map(boxed, tunable, is_leaf=_is_leaf)


def _box_like(box: Any, factor: Any, axes: tuple[int | None, ...]) -> Any:
    """A box for a factor, from the base's box and the base's axis of each of the factor's."""
    key = _nnx_key(box)
    names = tuple(box.names if key is None else box.get_metadata()[key])
    # Axes that a partition does not name are not partitioned.
    of_factor = tuple(None if d is None or d >= len(names) else names[d] for d in axes)
    if key is None:
        return dataclasses.replace(box.replace_boxed(factor), names=of_factor)
    return box.replace(factor, **{key: of_factor})

"""Boxes: nodes around one array in which Flax stores the partition of a parameter.

The box of a base names the base's axes. Factors have other axes, so each gets a box of its own.
Flax is not imported. A box is recognized by the methods of `flax.core.meta.AxisMetadata` and the
`names` of `flax.linen.Partitioned`, or as a `flax.nnx.Variable` with a partition.
"""

import dataclasses
from typing import Any

import jax

from ._adapter import Adapter
from ._frozen_weight import base_and_frozen_factors

# Flax 0.12 renamed `sharding_names`.
_NNX_KEYS = ("out_sharding", "sharding_names")


def _nnx_key(node: Any) -> str | None:
    if not hasattr(type(node), "from_metadata"):
        return None
    metadata = node.get_metadata()
    return next((key for key in _NNX_KEYS if metadata.get(key)), None)


def is_box(node: Any) -> bool:
    """Whether a node of a tree stores how the array in it is partitioned."""
    if hasattr(type(node), "replace_boxed"):
        return hasattr(node, "names")
    return _nnx_key(node) is not None


def content(node: Any) -> Any:
    """Returns the content of a box; any other node is returned unchanged."""
    if not is_box(node):
        return node
    [child] = jax.tree.leaves(node, is_leaf=lambda inner: inner is not node)
    return child


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, Adapter) or is_box(node)


def opened(tree: Any) -> Any:
    """Returns a tree without its boxes."""
    return jax.tree.map(content, tree, is_leaf=_is_leaf)


def bare(leaf: Any) -> Any:
    """Returns an adapter with its factors unboxed; any other leaf is returned unchanged."""
    if not isinstance(leaf, Adapter) or not any(map(is_box, leaf.factors().values())):
        return leaf
    return leaf.with_factors({name: content(node) for name, node in leaf.factors().items()})


def box_factors(tunable: Any, frozen: Any) -> Any:
    """Returns the tree with a box around each factor instead of a base's box around the adapter.

    `frozen` has the bases, for their shapes.
    """

    def boxed(node: Any, of_base: Any) -> Any:
        weight = content(node)
        if not is_box(node) or not isinstance(weight, Adapter):
            return node
        layout = weight.layout(base_and_frozen_factors(content(of_base))[0].shape)
        factors = {
            name: _box_like(node, factor, tuple(map(layout.axis_of, layout.factors[name])))
            for name, factor in weight.factors().items()
        }
        return weight.with_factors(factors)

    return jax.tree.map(boxed, tunable, frozen, is_leaf=_is_leaf)


def _box_like(box: Any, factor: Any, axes: tuple[int | None, ...]) -> Any:
    """Returns a box for a factor, given the base's box and the base's axis of each factor axis."""
    key = _nnx_key(box)
    names = tuple(box.names if key is None else box.get_metadata()[key])
    # Axes that a partition does not name are not partitioned.
    of_factor = tuple(None if d is None or d >= len(names) else names[d] for d in axes)
    if key is None:
        return dataclasses.replace(box.replace_boxed(factor), names=of_factor)
    return box.replace(factor, **{key: of_factor})

"""Leaves of trees: which are arrays, what they are called, and copies that are one's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_tracer


class Held:
    """A node of a tree that represents one array, which it holds in another form."""

    def array(self) -> jax.Array:
        """The array."""
        raise NotImplementedError


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that a model computes with."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | Held)


def own(leaf: Any) -> Any:
    """A copy of an array, placed as it is; anything else as it is.

    A training step that donates its state deletes these buffers, which must not be somebody
    else's. Tracers are copied too: `jax.vmap` returns an input that passes through it as it came.
    """
    if isinstance(leaf, np.ndarray):
        return np.array(leaf)
    if isinstance(leaf, Held):
        return jax.tree.map(own, leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    if not is_tracer(leaf) and not leaf.is_fully_addressable:
        # `device_put` takes no array that has parts in other processes.
        return jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
    return jax.device_put(leaf, may_alias=False)


def path_string(key_path: Any) -> str:
    """The path of a leaf as Lorax writes it in specs, messages and files: `h/0/attn/kernel`.

    Args:
        key_path: as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        The keys joined by `/`; `.` where the tree is the leaf.

    Example:
        >>> import jax
        >>> from lorax import path_string
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"h": [{"kernel": 1}]})
        >>> path_string(leaves[0][0])
        'h/0/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/") or "."

"""Leaves of trees: which of them are arrays, their paths, and copies that share no buffer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_tracer
from ._errors import ArgumentError


class Encoded:
    """A node of a tree that represents a single array in another form."""

    def array(self) -> jax.Array:
        """Returns the array."""
        raise NotImplementedError


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that a model computes with."""
    if isinstance(leaf, np.ndarray):
        # Not objects, strings, dates or time spans.
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | Encoded)


def own(leaf: Any) -> Any:
    """Returns a copy of an array with the same placement; any other leaf is returned unchanged.

    A training step that donates its state deletes these buffers, which must not be in use
    elsewhere. Tracers are copied too, because `jax.vmap` returns an input that passes through it
    unchanged.
    """
    if isinstance(leaf, np.ndarray):
        return np.array(leaf)
    if isinstance(leaf, Encoded):
        return jax.tree.map(own, leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    if not is_tracer(leaf) and not leaf.is_fully_addressable:
        # `device_put` does not accept arrays with shards in other processes.
        return jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
    return jax.device_put(leaf, may_alias=False)


def checked_key(key: Any, function: str) -> jax.Array:
    """Returns a single PRNG key, of the new style; raises `ArgumentError` for anything else."""
    dtype = getattr(key, "dtype", None)
    if dtype == jnp.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or key.ndim:
        given = type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)}"
        raise ArgumentError(
            f"{function} takes one PRNG key, as jax.random.key returns it, not {given}."
        )
    return key


def path_string(key_path: Any) -> str:
    """Returns a path as Lorax writes it in specs, messages and files: `h/0/attn/kernel`.

    Args:
        key_path: a path from `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The keys joined by `/`, or `.` if the tree is a single leaf.

    Example:
        >>> import jax
        >>> from lorax import path_string
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"h": [{"kernel": 1}]})
        >>> path_string(leaves[0][0])
        'h/0/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/") or "."

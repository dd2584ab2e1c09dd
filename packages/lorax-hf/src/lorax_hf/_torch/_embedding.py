"""Embedding lookups with a padding index, as a `take` without a gradient for padding.

torchax 0.0.13 wraps such a lookup in a `jax.custom_jvp`, for which an adapted table would have to
be materialized. `stop_gradient` on the rows of the padding index gives the same gradient.
"""

import jax
import jax.numpy as jnp
import torch


def _embedding(
    table: jax.Array,
    ids: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    # PyTorch raises an error for a negative index. As for one that is too large, the row is NaN.
    rows = jnp.take(table, jnp.where(ids < 0, len(table), ids), axis=0)  # [*ids, features]
    if scale_grad_by_freq:
        count = jnp.zeros(len(table), rows.dtype).at[ids].add(1)
        rows = _with_gradient(rows, 1 / count[ids][..., None])
    if padding_idx == -1:
        return rows
    is_padding = (ids == padding_idx % table.shape[0])[..., None]  # [*ids, 1]
    return jnp.where(is_padding, jax.lax.stop_gradient(rows), rows)


def _with_gradient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The same values, with a gradient that is multiplied by `scale`."""
    constant = jax.lax.stop_gradient(x)
    return constant + scale * (x - constant)


OPERATORS = {torch.ops.aten.embedding: _embedding}

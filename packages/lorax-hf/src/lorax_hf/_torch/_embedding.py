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
    rows = jnp.take(table, ids, axis=0)  # [*ids, features]
    if padding_idx == -1:
        return rows
    is_padding = (ids == padding_idx % table.shape[0])[..., None]  # [*ids, 1]
    return jnp.where(is_padding, jax.lax.stop_gradient(rows), rows)


OPERATORS = {torch.ops.aten.embedding: _embedding}

"""Look-ups with a padding index, as a `take` whose gradient PyTorch's rule cuts.

torchax 0.0.13 wraps such a look-up in a `jax.custom_jvp`, behind which an adapted table would have
to be built. Here the rows of the padding index are constants, which gives the same gradient.
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

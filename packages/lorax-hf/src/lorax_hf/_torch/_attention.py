"""Scaled dot-product attention that returns zero for fully masked queries, as in PyTorch.

For a row that is masked everywhere, such as a query in the left padding of a prompt, torchax 0.0.13
computes the softmax of −inf, which is NaN and spreads through the next layer. PyTorch returns zero.
As in PyTorch, the softmax of narrower types is computed in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch

from lorax import ArgumentError


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    env: Any = None,
) -> jax.Array:
    if enable_gqa:
        # Grouped-query attention: several query heads share one head of keys and values.
        key = jnp.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = jnp.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = jnp.matmul(query, jnp.swapaxes(key, -1, -2)) * scale  # [*batch, queries, keys]
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if is_causal:
        if attn_mask is not None:
            raise ArgumentError("scaled_dot_product_attention takes `attn_mask` or `is_causal`.")
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None:
        hidden = jnp.where(attn_mask, 0.0, -jnp.inf) if attn_mask.dtype == bool else attn_mask
        scores = scores + hidden.astype(scores.dtype)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1, total)).astype(query.dtype)
    if dropout_p > 0:
        kept = jax.random.bernoulli(env.get_and_rotate_prng_key(), 1 - dropout_p, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_p), 0).astype(query.dtype)
    return jnp.matmul(weights, value)  # [*batch, queries, features]


OPERATORS = {
    torch.nn.functional.scaled_dot_product_attention: attention,
    torch.ops.aten.scaled_dot_product_attention: attention,
}

"""`torch.nn.functional.linear`, for which torchax 0.0.13 does not accept keyword arguments."""

import jax
import jax.numpy as jnp
import torch


def _linear(input: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    out = jnp.einsum("...i,oi->...o", input, weight) if weight.ndim == 2 else input @ weight
    return out if bias is None else out + bias  # [*batch, out]


OPERATORS = {torch.nn.functional.linear: _linear}

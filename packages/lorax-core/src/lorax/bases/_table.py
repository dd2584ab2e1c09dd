"""Codes that are indices into a small table.

A table is read by a gather on CPUs and GPUs, and by a tree of selects on TPUs: each is many times
slower, or takes memory of the size of the weight, where the other one is used.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def read(codes: jax.Array, table: Sequence[float], dtype) -> jax.Array:
    """The entries of a table of 16."""
    values = np.asarray(table, dtype)

    def gather(codes: jax.Array) -> jax.Array:
        indices, entries = codes.astype(jnp.uint8), jnp.asarray(values)
        options: dict[str, Any] = {"mode": "promise_in_bounds"}
        sharding = jax.typeof(codes).sharding
        if AxisType.Explicit in sharding.mesh.axis_types:
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
            entries = jax.sharding.reshard(entries, everywhere)
            return entries.at[indices].get(out_sharding=sharding, **options)
        return entries.at[indices].get(**options)

    def select(codes: jax.Array) -> jax.Array:
        # A gather is slow on TPU: a table of 16 is four rounds of selects, one for each bit.
        indices = codes.astype(jnp.int32)
        level = list(values)
        for bit in range(4):
            is_on = (indices >> bit) & 1 == 1
            level = [
                jnp.where(is_on, high, low)
                for low, high in zip(level[::2], level[1::2], strict=True)
            ]
        return level[0]

    return jax.lax.platform_dependent(codes, tpu=select, default=gather)


def nearest(normal: jax.Array, table: Sequence[float]) -> jax.Array:
    """The position in a table, sorted, of the entry nearest to each number."""
    # How many midpoints are below a number is the position of the nearest entry.
    edges = [(low + high) / 2 for low, high in zip(table, table[1:], strict=False)]
    position = jnp.zeros(normal.shape, jnp.uint8)
    for edge in edges:
        position += (normal > edge).astype(jnp.uint8)
    return position

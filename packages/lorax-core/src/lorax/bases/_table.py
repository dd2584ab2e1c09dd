"""Formats whose codes are indices into a small table.

A table is read by a gather on CPUs and GPUs, and by selects on TPUs. On the other platforms, each
of the two is many times slower, or needs memory of the size of the weight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._entrywise import entrywise


def read(codes: jax.Array, table: Sequence[float], dtype: Any) -> jax.Array:
    """Returns the entries of a table of 16 at `codes`."""
    return _read(codes, table=tuple(table), dtype=jnp.dtype(dtype))


def _by_gather(codes: jax.Array, *, table: Sequence[float], dtype: Any) -> jax.Array:
    entries, indices = jnp.asarray(np.asarray(table, dtype)), codes.astype(jnp.uint8)
    # A code of four bits is always in range, so no index is clamped.
    options: dict[str, Any] = {"mode": "promise_in_bounds"}
    sharding = jax.typeof(codes).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        # The table is tiny, so it is replicated.
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        entries = jax.sharding.reshard(entries, everywhere)
        options["out_sharding"] = sharding
    return entries.at[indices].get(**options)


def _by_selects(codes: jax.Array, *, table: Sequence[float], dtype: Any) -> jax.Array:
    # A gather is slow on TPU: a table of 16 is four rounds of selects, one for each bit.
    indices = codes.astype(jnp.int32)
    level = list(np.asarray(table, dtype))
    for bit in range(4):
        is_on = (indices >> bit) & 1 == 1
        level = [
            jnp.where(is_on, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


_read = entrywise("read_table", _by_gather, tpu=_by_selects)


def nearest(normal: jax.Array, table: Sequence[float]) -> jax.Array:
    """Returns the position of the entry of a sorted table that is nearest to each number."""
    # The position of the nearest entry is the number of midpoints below.
    edges = [(low + high) / 2 for low, high in zip(table, table[1:], strict=False)]
    position = jnp.zeros(normal.shape, jnp.uint8)
    for edge in edges:
        position += (normal > edge).astype(jnp.uint8)
    return position

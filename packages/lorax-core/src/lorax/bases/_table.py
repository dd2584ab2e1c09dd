"""Formats whose codes are indices into a small table.

A table is read by a gather on CPUs and GPUs, and by selects on TPUs. On the other platforms, each
of the two is many times slower, or needs memory of the size of the weight. The choice is made when
a program is lowered, so that it can be compiled ahead of time for another platform.

JAX sees a single primitive. `jax.lax.platform_dependent` would be a branch with both forms, which
every pass over a program walks through.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_read_p = Primitive("read_table")


def read(codes: jax.Array, table: Sequence[float], dtype: Any) -> jax.Array:
    """Returns the entries of a table of 16 at `codes`."""
    sharding = jax.typeof(codes).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return _by_platform(codes, table=tuple(table), dtype=jnp.dtype(dtype))
    return _read_p.bind(codes, table=tuple(table), dtype=jnp.dtype(dtype))


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


def _by_platform(codes: jax.Array, **settings: Any) -> jax.Array:
    """Returns the same for explicit axes, as an equation inside a lowering has no mesh."""
    select, gather = (functools.partial(form, **settings) for form in (_by_selects, _by_gather))
    return jax.lax.platform_dependent(codes, tpu=select, default=gather)


# Outside jit, the primitive runs as a compiled program of one equation.
_read_p.def_impl(jax.jit(_read_p.bind, static_argnames=("table", "dtype")))
_read_p.def_abstract_eval(lambda codes, *, table, dtype: codes.update(dtype=dtype))
mlir.register_lowering(_read_p, mlir.lower_fun(_by_gather, multiple_results=False))
mlir.register_lowering(_read_p, mlir.lower_fun(_by_selects, multiple_results=False), platform="tpu")
batching.defvectorized(_read_p)
ad.defjvp(_read_p, None)  # codes have no derivative


def nearest(normal: jax.Array, table: Sequence[float]) -> jax.Array:
    """Returns the position of the entry of a sorted table that is nearest to each number."""
    # The position of the nearest entry is the number of midpoints below.
    edges = [(low + high) / 2 for low, high in zip(table, table[1:], strict=False)]
    position = jnp.zeros(normal.shape, jnp.uint8)
    for edge in edges:
        position += (normal > edge).astype(jnp.uint8)
    return position

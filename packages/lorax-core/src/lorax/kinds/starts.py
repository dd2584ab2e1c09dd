"""First factors of plain LoRA that are made from the weight, or together.

Each is a function of one matrix `[in, out]`, the rank, the scale and a key, and returns `a [in, r]`
and `b [r, out]`. Those in `MOVING` are the weight's own: the base gives up what they hold, so that
the adapted weight is at first what the weight was.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Start, Started

Factors = tuple[jax.Array, jax.Array]


def pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """The largest singular values and their vectors (Meng et al. 2024, arXiv:2404.02948)."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale).astype(matrix.dtype)
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """The first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Both factors random, through orthogonal halves of the rank, so that their product is zero."""
    q_key, a_key, b_key = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(q_key, (rank, rank), matrix.dtype))[0]
    half = rank // 2
    a = jax.random.normal(a_key, (matrix.shape[0], half), matrix.dtype) @ q[0::2]
    b = q[1::2].T @ jax.random.normal(b_key, (half, matrix.shape[1]), matrix.dtype)
    return a / 10, b / 10


STARTS: dict[str, Callable[[jax.Array, int, float, jax.Array], Factors]] = {
    "pissa": pissa,
    "olora": olora,
    "orthogonal": orthogonal,
}

MOVING = ("pissa", "olora")


def start_from_matrix(name: str, start: Start, weight: Any) -> Started:
    """The first state of a LoRA weight whose factors a function of `STARTS` makes."""
    base, (shared, inputs, outputs) = start.array(weight, "the weight itself"), start.axes
    order = (*shared, *inputs, *outputs)
    fan_in, fan_out = start.axes.sizes(base.shape)
    matrices = jnp.transpose(base, order).reshape(-1, fan_in, fan_out)  # [shared, in, out]
    keys = jax.random.split(start.key, matrices.shape[0])

    @jax.vmap
    def make(matrix: jax.Array, key: jax.Array) -> Factors:
        return STARTS[name](matrix.astype(start.dtype), weight.rank, weight.scale, key)

    a, b = jax.jit(make)(matrices, keys)
    shapes = weight.layout(base.shape).shapes()
    adapter = weight.with_factors({"a": a.reshape(shapes["a"]), "b": b.reshape(shapes["b"])})
    moved = adapter.applied(base).removed() if name in MOVING else None
    return Started(adapter, {}, moved)

"""First factors of plain LoRA that are made from the weight, together, or from what was collected.

Each of `STARTS` is a function of one matrix `[in, out]`, the rank, the scale and a key, and returns
`a [in, r]` and `b [r, out]`. Those in `MOVING` are the weight's own: the base gives up what they
hold, so that the adapted weight is at first what the weight was.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Start, Started
from .._errors import SpecError
from .collected import CollectedStart

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
    base = start.array(weight, "the weight itself")
    matrices = start.axes.matrices(jnp.asarray(base))  # [shared, in, out]
    keys = jax.random.split(start.key, matrices.shape[0])

    @jax.vmap
    def make(matrix: jax.Array, key: jax.Array) -> Factors:
        return STARTS[name](matrix.astype(start.dtype), weight.rank, weight.scale, key)

    a, b = jax.jit(make)(matrices, keys)
    return _started(start, weight, a, b, name in MOVING)


def start_from_collected(init: CollectedStart, start: Start, weight: Any) -> Started:
    """The first state of a LoRA weight whose factors were collected from inputs or gradients."""
    if start.collected is None:
        raise SpecError(
            f"`{start.path}` has {init}, which takes its factors from {init.source}. Pass "
            "init_lora(collected=collect_starts(fn, params, spec, batches))."
        )
    kept = start.collected
    rank, scale, shape = weight.rank, weight.scale, start.base.shape
    fan_in, fan_out = start.axes.sizes(shape)
    count = math.prod(shape[d] for d in start.axes.shared)
    try:
        factors = jax.vmap(lambda kept: init.factors(kept, rank, scale))(kept)
        a, b = factors
        b = jnp.zeros((count, rank, fan_out)) if b is None else b
        fits = (a.shape, b.shape) == ((count, fan_in, rank), (count, rank, fan_out))
    except (KeyError, TypeError, ValueError):
        fits, a, b = False, None, None
    if not fits:
        raise SpecError(
            f"`{start.path}` has {init} and rank {rank}, and what was collected for it belongs to "
            f"another spec or shape than {tuple(shape)}. Call collect_starts with these parameters "
            "and this spec."
        )
    return _started(start, weight, a, b, init.moves)


def _started(start: Start, weight: Any, a: Any, b: Any, moves: bool) -> Started:
    shapes = weight.layout(start.base.shape).shapes()
    factors = {"a": a, "b": b}
    adapter = weight.with_factors(
        {name: x.astype(start.dtype).reshape(shapes[name]) for name, x in factors.items()}
    )
    return Started(adapter, {}, adapter.applied(start.base).removed() if moves else None)

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
from .._arrays import Held
from .._base import Format, blank_of, decoded, encoded, format_of
from .._errors import SpecError

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


# Whose factors are those of what a format loses, as "loftq" or "loftq:int8".
LOFTQ = "loftq"


def loftq_format(name: str) -> str | None:
    """The name of the format of a start by LoftQ; None for another start."""
    kind, _, format = name.partition(":")
    return (format or "nf4") if kind == LOFTQ else None


def start_from_matrix(name: str, start: Start, weight: Any) -> Started:
    """The first state of a LoRA weight whose factors are made from its base."""
    format = loftq_format(name)
    if format is not None:
        return _start_beside_codes(format_of(format), start, weight)
    base = start.array(weight, "the weight itself")
    adapter = _with_factors_of(name, base, start, weight)
    moved = adapter.applied(base).removed() if name in MOVING else None
    return Started(adapter, {}, moved)


def _with_factors_of(name: str, base: jax.Array, start: Start, weight: Any) -> Any:
    """The adapter whose factors a function of `STARTS` makes of `base`."""
    shared, inputs, outputs = start.axes
    order = (*shared, *inputs, *outputs)
    fan_in, fan_out = start.axes.sizes(base.shape)
    matrices = jnp.transpose(base, order).reshape(-1, fan_in, fan_out)  # [shared, in, out]
    keys = jax.random.split(start.key, matrices.shape[0])

    @jax.vmap
    def make(matrix: jax.Array, key: jax.Array) -> Factors:
        return STARTS[name](matrix.astype(start.dtype), weight.rank, weight.scale, key)

    a, b = jax.jit(make)(matrices, keys)
    shapes = weight.layout(base.shape).shapes()
    return weight.with_factors({"a": a.reshape(shapes["a"]), "b": b.reshape(shapes["b"])})


def _start_beside_codes(format: Format, start: Start, weight: Any) -> Started:
    """LoftQ (Li et al. 2023, arXiv:2310.08659): codes of W, and factors of what they lose.

    Q = codes(W), and a b = the largest singular vectors of W − Q.
    """
    if isinstance(start.base, Held):
        raise SpecError(
            f"`{start.path}` is quantized, and init='loftq' takes its factors from what the codes "
            "lose. Call init_lora on the floats: it makes the codes, too."
        )
    base = start.array(weight, "the weight itself")
    shape = tuple(base.shape)
    held = encoded(blank_of(start.path, shape, start.axes.inputs, format, base.dtype), base)
    wide = start.dtype
    lost = base.astype(wide) - decoded(held).astype(wide)
    return Started(_with_factors_of("pissa", lost, start, weight), {}, held)

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

from .._adapter_spec import Start, Started
from .._arrays import Held
from .._base import blank_of, decoded, encoded
from .._base_format import Format, format_of
from .._errors import SpecError
from .collected import CollectedStart

Factors = tuple[jax.Array, jax.Array]


def pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """The largest singular values and their vectors (Meng et al. 2024, arXiv:2404.02948)."""
    # W = U diag(σ) Vᵀ; scale · a b = the first `rank` parts of it, with √σ on both sides.
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale).astype(matrix.dtype)
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """The first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""
    # Wᵀ = Q R, so W = Rᵀ Qᵀ: a [in, rank] from Rᵀ, b [rank, out] from Qᵀ
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Both factors random, through orthogonal halves of the rank, so that their product is zero."""
    q_key, a_key, b_key = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(q_key, (rank, rank), matrix.dtype))[0]
    # a = A q[even], b = q[odd]ᵀ B: rows of an orthogonal q are orthogonal, so a b = A 0 B = 0.
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
    a, b = _factors_of(name, base, start, weight)
    return _started(start, weight, a, b, name in MOVING)


def _factors_of(name: str, base: jax.Array, start: Start, weight: Any) -> Factors:
    """Factors of `base` by a function of `STARTS`, for each entry of the shared axes."""
    matrices = start.axes.matrices(jnp.asarray(base))  # [shared, in, out]
    keys = jax.random.split(start.key, matrices.shape[0])

    @jax.vmap
    def make(matrix: jax.Array, key: jax.Array) -> Factors:
        return STARTS[name](matrix.astype(start.dtype), weight.rank, weight.scale, key)

    return jax.jit(make)(matrices, keys)


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
        keys = jax.random.split(start.key, count)
        a, b = jax.vmap(lambda kept, key: init.factors(kept, rank, scale, key))(kept, keys)
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
    adapter = _with_factors(start, weight, a, b)
    if not moves:
        return Started(adapter)
    return Started(adapter, {}, adapter.applied(start.array(weight, "the weight itself")).removed())


def _with_factors(start: Start, weight: Any, a: Any, b: Any) -> Any:
    shapes = weight.layout(start.base.shape).shapes()
    factors = {"a": a, "b": b}
    return weight.with_factors(
        {name: x.astype(start.dtype).reshape(shapes[name]) for name, x in factors.items()}
    )


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
    held = encoded(blank_of(start.path, base, start.axes.inputs, format), base)
    wide = start.dtype
    # W − decode(codes): the factors hold the largest part of what the codes lose.
    lost = base.astype(wide) - decoded(held).astype(wide)
    a, b = _factors_of("pissa", lost, start, weight)
    return Started(_with_factors(start, weight, a, b), {}, held)

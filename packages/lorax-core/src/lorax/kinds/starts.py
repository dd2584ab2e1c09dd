"""Initial factors of plain LoRA that are made from the weight or from collected statistics.

Each function in `STARTS` takes one matrix `[in, out]`, the rank, the scale and a key, and returns
`a [in, r]` and `b [r, out]`. For those in `MOVING`, the product is subtracted from the base, so
that the adapted weight initially equals the original one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter_spec import Start, Started
from .._arrays import Encoded
from .._base import blank_of, decoded, encoded
from .._base_format import Format, format_of
from .._errors import SpecError
from .collected import CollectedStart

Factors = tuple[jax.Array, jax.Array]


def pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Returns the largest singular vectors, scaled (Meng et al. 2024, arXiv:2404.02948)."""
    # W = U diag(σ) Vᵀ, and scale · a b is its first `rank` components, with √σ on both sides.
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale).astype(matrix.dtype)
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Returns the first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""
    # Wᵀ = Q R, so W = Rᵀ Qᵀ: a [in, rank] from Rᵀ, b [rank, out] from Qᵀ
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Returns random factors whose product is zero, through orthogonal halves of the rank."""
    q_key, a_key, b_key = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(q_key, (rank, rank), matrix.dtype))[0]
    # a = A q[even], b = q[odd]ᴴ B: rows of a unitary q are orthogonal, so a b = A 0 B = 0.
    half = rank // 2
    a = jax.random.normal(a_key, (matrix.shape[0], half), matrix.dtype) @ q[0::2]
    b = q[1::2].conj().T @ jax.random.normal(b_key, (half, matrix.shape[1]), matrix.dtype)
    return a / 10, b / 10


STARTS: dict[str, Callable[[jax.Array, int, float, jax.Array], Factors]] = {
    "pissa": pissa,
    "olora": olora,
    "orthogonal": orthogonal,
}

MOVING = ("pissa", "olora")


# Starts whose factors come from the error of a format: "loftq", or for example "loftq:int8".
LOFTQ = "loftq"


def loftq_format(name: str) -> str | None:
    """Returns the name of the format of a LoftQ start, or None for another start."""
    kind, _, format = name.partition(":")
    return (format or "nf4") if kind == LOFTQ else None


def start_from_matrix(name: str, start: Start, weight: Any) -> Started:
    """Returns the initial state of a LoRA weight whose factors are made from its base."""
    format = loftq_format(name)
    if format is not None:
        return _start_beside_codes(format_of(format), start, weight)
    base = start.array(weight, "the weight itself")
    a, b = _factors_of(name, base, start, weight)
    return _started(start, weight, a, b, name in MOVING)


def _factors_of(name: str, base: jax.Array, start: Start, weight: Any) -> Factors:
    """Applies a function of `STARTS` to each entry of the shared axes of `base`."""
    matrices = start.axes.matrices(jnp.asarray(base))  # [shared, in, out]
    keys = jax.random.split(start.key, matrices.shape[0])

    @jax.vmap
    def make(matrix: jax.Array, key: jax.Array) -> Factors:
        return STARTS[name](matrix.astype(start.dtype), weight.rank, weight.scale, key)

    return jax.jit(make)(matrices, keys)


def start_from_collected(init: CollectedStart, start: Start, weight: Any) -> Started:
    """Returns the initial state of a LoRA weight whose factors use collected statistics."""
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
        # Statistics of another shape or rank would otherwise fail much later.
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
    """LoftQ (Li et al. 2023, arXiv:2310.08659): quantizes W and approximates the error.

    Q = decode(codes(W)), and scale · a b = the largest singular components of W − Q.
    """
    if isinstance(start.base, Encoded):
        raise SpecError(
            f"`{start.path}` is quantized, and init='loftq' computes the factors from the error "
            "of quantization. Call init_lora on the floating-point weight, which it quantizes "
            "itself."
        )
    base = start.array(weight, "the weight itself")
    quantized = encoded(blank_of(start.path, base, start.axes.inputs, format), base)
    wide = start.dtype
    # W − decode(codes): PiSSA of the error gives its best approximation of this rank.
    lost = base.astype(wide) - decoded(quantized).astype(wide)
    a, b = _factors_of("pissa", lost, start, weight)
    return Started(_with_factors(start, weight, a, b), {}, quantized)

"""The leading singular vectors of a matrix, without computing the others.

A block Krylov space with a few more vectors than requested contains them to rounding error after
one or a few passes, each of which starts from the best vectors of the previous one. Musco and Musco
2015, arXiv:1504.05477.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Blocks per pass. More blocks need fewer passes, but a larger decomposition in each.
BLOCKS = 8
# The most passes before the whole matrix is decomposed: some spectra are too flat to converge.
MOST_PASSES = 12
# If a pass would hold more than this fraction of all vectors, decompose the whole matrix at once.
MOST_OF_ALL = 1 / 4
# The residual that is accepted, in rounding errors of the largest singular value. The full
# decomposition leaves about five.
ROUNDINGS = 16

Vectors = tuple[jax.Array, jax.Array, jax.Array]


def leading_vectors(matrix: jax.Array, rank: int) -> Vectors:
    """Returns the `rank` largest singular values of a matrix, with their vectors.

    Args:
        matrix: `[rows, columns]`, in float32 or wider.
        rank: how many singular values; at most the smaller side.

    Returns:
        `[rows, rank]`, `[rank]` in descending order, and `[rank, columns]`.
    """
    # Extra vectors: convergence depends on the gap to the value after the last one kept.
    width = rank + max(8, rank // 2)
    if BLOCKS * width > MOST_OF_ALL * min(matrix.shape):
        return _of_all(matrix, rank)
    last = _iterated(matrix, rank, width)
    # [rows, width] -> [rows, rank]: the extra vectors only speed up convergence.
    kept = last.left[:, :rank], last.values, last.right
    return jax.lax.cond(
        last.error <= _tolerance(matrix), lambda: kept, lambda: _of_all(matrix, rank)
    )


def _of_all(matrix: jax.Array, rank: int) -> Vectors:
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _tolerance(matrix: jax.Array) -> float:
    return ROUNDINGS * float(jnp.finfo(matrix.dtype).eps)


class _Pass(NamedTuple):
    """The result of one pass; `left` has more vectors than requested, for the next pass."""

    left: jax.Array
    values: jax.Array
    right: jax.Array
    error: jax.Array
    passes: jax.Array


def _iterated(matrix: jax.Array, rank: int, width: int) -> _Pass:
    rows, columns = matrix.shape

    def step(before: _Pass) -> _Pass:
        # The Krylov basis [block, A Aᵀ block, (A Aᵀ)² block, …], each block orthogonalized
        # against the earlier ones.
        block = jnp.linalg.qr(before.left)[0]  # [rows, width]
        blocks = [block]
        for _ in range(BLOCKS - 1):
            block = _product(matrix, _product(matrix.T, block))
            for earlier in blocks:
                block -= _product(earlier, _product(earlier.T, block))
            block = jnp.linalg.qr(block)[0]
            blocks.append(block)
        # If the matrix has low rank, later blocks are noise that may not be orthogonal to earlier
        # ones, so the whole basis is orthogonalized once more.
        basis = jnp.linalg.qr(jnp.concatenate(blocks, 1))[0]  # [rows, BLOCKS · width]
        # matrixᵀ basis  =  right diag(values) innerᵀ
        projected = _product(matrix.T, basis)
        right, values, inner = jnp.linalg.svd(projected, full_matrices=False)
        left = _product(basis, inner[:width].T)
        # ‖A v − σ u‖ of each vector: zero for exact singular vectors.
        rest = _product(matrix, right[:, :rank]) - left[:, :rank] * values[None, :rank]
        # Relative to the largest singular value, like the tolerance.
        error = jnp.max(jnp.linalg.norm(rest, axis=0)) / values[0]
        return _Pass(left, values[:rank], right[:, :rank].T, error, before.passes + 1)

    # A fixed key: the result must not depend on anything but the matrix.
    start = _Pass(
        jax.random.normal(jax.random.key(0), (rows, width), matrix.dtype),
        jnp.zeros(rank, matrix.dtype),
        jnp.zeros((rank, columns), matrix.dtype),
        jnp.asarray(jnp.inf, matrix.dtype),
        jnp.asarray(0),
    )
    return jax.lax.while_loop(
        lambda last: (last.error > _tolerance(matrix)) & (last.passes < MOST_PASSES), step, start
    )


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

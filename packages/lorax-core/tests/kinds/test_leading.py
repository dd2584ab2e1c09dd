"""The leading vectors of a matrix beside its whole decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.kinds.leading import BLOCKS, MOST_OF_ALL, MOST_PASSES, _iterated, leading_vectors

RANK = 3
WIDTH = RANK + 8
ROWS, COLUMNS = 380, 420


def of_values(values, rows=ROWS, columns=COLUMNS):
    keys = jax.random.split(jax.random.key(0))
    left = jnp.linalg.qr(jax.random.normal(keys[0], (rows, len(values))))[0]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (columns, len(values))))[0]
    return (left * values[None]) @ right.T


INDEX = np.arange(1, 301, dtype=np.float32)
SPECTRA = {
    "falling": 1 / INDEX,
    "steep": 0.5**INDEX,
    "of low rank": np.where(INDEX < 5, 1 / INDEX, 0),
    "of many sizes": 1e4 * INDEX**-3,
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_beside_the_whole_decomposition(values):
    assert min(ROWS, COLUMNS) * MOST_OF_ALL >= BLOCKS * WIDTH
    matrix = of_values(values)
    left, largest, right = jax.jit(leading_vectors, static_argnums=1)(matrix, RANK)
    assert int(_iterated(matrix, RANK, WIDTH).passes) < MOST_PASSES
    expected_left, expected, expected_right = jnp.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(largest, expected[:RANK], rtol=1e-5)
    for ours, theirs in ((left.T, expected_left.T), (right, expected_right)):
        for one, other in zip(ours, theirs, strict=False):
            assert abs(float(one @ other)) > 1 - 1e-5
    np.testing.assert_allclose(left.T @ left, np.eye(RANK), atol=1e-5)


def test_noise_whose_values_are_close():
    """Random matrices have no gap; what is found is as good as the whole decomposition."""
    matrix = jax.random.normal(jax.random.key(1), (ROWS, COLUMNS))
    left, values, right = leading_vectors(matrix, RANK)
    expected = jnp.linalg.svd(matrix, compute_uv=False)[:RANK]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(matrix @ right.T, left * values[None], atol=1e-4 * float(values[0]))


def test_equal_values_are_left_to_the_whole_decomposition():
    matrix = jnp.eye(ROWS) + 1e-3 * jax.random.normal(jax.random.key(2), (ROWS, ROWS)) / ROWS
    _, values, _ = leading_vectors(matrix, RANK)
    expected = jnp.linalg.svd(matrix, compute_uv=False)[:RANK]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_zeros_give_zeros():
    """A gradient that is zero everywhere; the caller says what is wrong with it."""
    _, values, _ = leading_vectors(jnp.zeros((ROWS, COLUMNS)), RANK)
    assert not values.any()

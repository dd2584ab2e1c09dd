"""Leading singular vectors, compared with the full decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.kinds.leading import BLOCKS, MOST_OF_ALL, MOST_PASSES, _iterated, leading_vectors

RANK = 3
WIDTH = RANK + 8
ROWS, COLUMNS = 380, 420


def matrix_of_spectrum(values, rows=ROWS, columns=COLUMNS):
    keys = jax.random.split(jax.random.key(0))
    left = jnp.linalg.qr(jax.random.normal(keys[0], (rows, len(values))))[0]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (columns, len(values))))[0]
    return (left * values[None]) @ right.T


INDEX = np.arange(1, 301, dtype=np.float32)
SPECTRA = {
    "falling": 1 / INDEX,
    "steep": 0.5**INDEX,
    "low rank": np.where(INDEX < 5, 1 / INDEX, 0),
    "wide range": 1e4 * INDEX**-3,
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_matches_the_full_decomposition(values):
    assert min(ROWS, COLUMNS) * MOST_OF_ALL >= BLOCKS * WIDTH
    matrix = matrix_of_spectrum(values)
    left, largest, right = jax.jit(leading_vectors, static_argnums=1)(matrix, RANK)
    assert int(_iterated(matrix, RANK, WIDTH).passes) < MOST_PASSES
    expected_left, expected, expected_right = jnp.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(largest, expected[:RANK], rtol=1e-5)
    for vectors, wanted in ((left.T, expected_left.T), (right, expected_right)):
        for vector, other in zip(vectors, wanted, strict=False):
            assert abs(float(vector @ other)) > 1 - 1e-5
    np.testing.assert_allclose(left.T @ left, np.eye(RANK), atol=1e-5)


def test_noise_with_close_singular_values():
    """A random matrix has no gap after its leading values, so its vectors are not compared."""
    matrix = jax.random.normal(jax.random.key(1), (ROWS, COLUMNS))
    left, values, right = leading_vectors(matrix, RANK)
    expected = jnp.linalg.svd(matrix, compute_uv=False)[:RANK]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(matrix @ right.T, left * values[None], atol=1e-4 * float(values[0]))


def test_nearly_equal_singular_values_are_accurate():
    matrix = jnp.eye(ROWS) + 1e-3 * jax.random.normal(jax.random.key(2), (ROWS, ROWS)) / ROWS
    _, values, _ = leading_vectors(matrix, RANK)
    expected = jnp.linalg.svd(matrix, compute_uv=False)[:RANK]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_matrix_of_zeros_has_zero_singular_values():
    """As for a gradient of zeros: the caller raises, and needs zeros rather than NaNs."""
    _, values, _ = leading_vectors(jnp.zeros((ROWS, COLUMNS)), RANK)
    assert not values.any()

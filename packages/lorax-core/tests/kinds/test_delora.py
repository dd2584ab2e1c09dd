"""DeLoRA: how long its delta is, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import DeloraSpec, DoraSpec, SpecError, init_lora, lora, merge_params
from lorax.testing import random_factors

W = jax.random.normal(jax.random.key(7), (2, 9, 7))
STACKED = DeloraSpec(2, shared_axes=[0])


def start(spec, params=W):
    return init_lora({"w": params}, {"w": spec}, jax.random.key(0))


def test_its_length_is_not_that_of_its_factors():
    frozen, tunable = start(STACKED)
    weight = random_factors(tunable, jax.random.key(1))["w"]
    longer = weight.with_factors(weight.factors() | {"a": 3 * weight.a, "b": 5 * weight.b})
    merged = merge_params(frozen, {"w": weight})["w"]
    np.testing.assert_allclose(merge_params(frozen, {"w": longer})["w"], merged, rtol=1e-4)


def test_is_the_product_of_normalized_factors():
    frozen, tunable = start(STACKED)
    weight = random_factors(tunable, jax.random.key(1))["w"]
    merged = merge_params(frozen, {"w": weight})["w"]
    for k in range(2):  # Each entry has its own length and norms.
        a, b = weight.a[k], weight.b[k]
        a, b = (
            a / jnp.linalg.norm(a, axis=0, keepdims=True),
            b / jnp.linalg.norm(b, axis=1, keepdims=True),
        )
        norm = jnp.linalg.norm(W[k], axis=1, keepdims=True)
        expected = W[k] + norm * (weight.length[k] / 2) * (a @ b)
        np.testing.assert_allclose(merged[k], expected, rtol=1e-4, atol=1e-5)


def test_a_factor_of_zero_has_a_finite_gradient():
    frozen, tunable = start(STACKED)
    assert (tunable["w"].b == 0).all()
    loss = lambda t: (lora(lambda p, x: x @ p["w"][0])((frozen, t), jnp.ones((3, 9))) ** 2).sum()  # noqa: E731
    grads = jax.grad(loss)(tunable)["w"]
    assert jnp.isfinite(grads.b).all() and (grads.b[0] != 0).any()


def test_first_values():
    frozen, tunable = start(DeloraSpec(2, length=4, shared_axes=[0]))
    assert tunable["w"].length.tolist() == [4, 4]
    norms = jnp.sqrt((W * W).sum(2))
    np.testing.assert_allclose(frozen["w"].factors["norm"], norms, rtol=1e-6)


BAD = {
    "rank 0": (DeloraSpec(0), "`w` has a DeloraSpec of rank 0; ranks begin at 1"),
    "rank '2'": (DeloraSpec("2"), "`w` has rank '2'; a rank is a positive int"),  # pyright: ignore
    "length 0": (DeloraSpec(2, length=0), "`w` has length 0; .* other than zero"),
    "no number": (DeloraSpec(2, length="x"), "`w` has length 'x'; it must be a finite number"),  # pyright: ignore
    "DoRA": (DoraSpec(DeloraSpec(2)), "`w` has a DoraSpec of a DeloraSpec"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        start(spec)


def test_vectors_raise():
    with pytest.raises(SpecError, match="`w` has 1 dimension.*give it LORA_FREEZE or LORA_FULL"):
        start(DeloraSpec(2), jnp.ones(5))


def test_shapes_alone_raise():
    with pytest.raises(SpecError, match="needs the norms of the weight, .* under jax.eval_shape"):
        start(DeloraSpec(2), jax.ShapeDtypeStruct((5, 3), jnp.float32))  # pyright: ignore

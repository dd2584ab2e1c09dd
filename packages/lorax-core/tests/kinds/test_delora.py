"""DeLoRA: the norm of its delta, initial values, and invalid specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import DeloraSpec, DoraSpec, SpecError, init_lora, lora, merge_params
from lorax.testing import random_factors

W = jax.random.normal(jax.random.key(7), (2, 9, 7))
STACKED = DeloraSpec(2, shared_axes=[0])


def init_pair(spec, params=W):
    return init_lora({"w": params}, {"w": spec}, jax.random.key(0))


def test_rescaling_the_factors_does_not_change_the_delta():
    frozen, tunable = init_pair(STACKED)
    weight = random_factors(tunable, jax.random.key(1))["w"]
    longer = weight.with_factors(weight.factors() | {"a": 3 * weight.a, "b": 5 * weight.b})
    merged = merge_params(frozen, {"w": weight})["w"]
    np.testing.assert_allclose(merge_params(frozen, {"w": longer})["w"], merged, rtol=1e-4)


def test_delta_is_the_product_of_normalized_factors():
    frozen, tunable = init_pair(STACKED)
    weight = random_factors(tunable, jax.random.key(1))["w"]
    merged = merge_params(frozen, {"w": weight})["w"]
    for k in range(2):  # Each entry of the stack has its own length and norms.
        a, b = weight.a[k], weight.b[k]
        a, b = (
            a / jnp.linalg.norm(a, axis=0, keepdims=True),
            b / jnp.linalg.norm(b, axis=1, keepdims=True),
        )
        norm = jnp.linalg.norm(W[k], axis=1, keepdims=True)
        expected = W[k] + norm * (weight.length[k] / 2) * (a @ b)
        np.testing.assert_allclose(merged[k], expected, rtol=1e-4, atol=1e-5)


def test_gradient_at_a_factor_of_zeros_is_finite():
    frozen, tunable = init_pair(STACKED)
    assert (tunable["w"].b == 0).all()
    loss = lambda t: (lora(lambda p, x: x @ p["w"][0])((frozen, t), jnp.ones((3, 9))) ** 2).sum()  # noqa: E731
    grads = jax.grad(loss)(tunable)["w"]
    assert jnp.isfinite(grads.b).all() and (grads.b[0] != 0).any()


def test_initial_values():
    frozen, tunable = init_pair(DeloraSpec(2, length=4, shared_axes=[0]))
    assert tunable["w"].length.tolist() == [4, 4]
    norms = jnp.sqrt((W * W).sum(2))
    np.testing.assert_allclose(frozen["w"].factors["norm"], norms, rtol=1e-6)


BAD = {
    "rank 0": (DeloraSpec(0), "`w` has a DeloraSpec of rank 0; ranks begin at 1"),
    "rank '2'": (DeloraSpec("2"), "`w` has rank '2'; a rank is a positive int"),  # pyright: ignore
    "length 0": (DeloraSpec(2, length=0), "`w` has length 0; .* other than zero"),
    "string": (DeloraSpec(2, length="x"), "`w` has length 'x'; it must be a finite number"),  # pyright: ignore
    "DoRA": (DoraSpec(DeloraSpec(2)), "`w` has a DoraSpec of a DeloraSpec"),
}


@pytest.mark.parametrize("row", BAD)
def test_invalid_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        init_pair(spec)


def test_vector_raises():
    with pytest.raises(SpecError, match="`w` has 1 dimension.*give it LORA_FREEZE or LORA_FULL"):
        init_pair(DeloraSpec(2), jnp.ones(5))


def test_shape_without_values_raises():
    with pytest.raises(SpecError, match="needs the norms of the weight, .* under jax.eval_shape"):
        init_pair(DeloraSpec(2), jax.ShapeDtypeStruct((5, 3), jnp.float32))  # pyright: ignore

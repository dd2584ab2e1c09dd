"""VeRA: the pair of matrices that all weights share, and invalid specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax import DoraSpec, SpecError, VeraSpec, init_lora, merge_params
from lorax.testing import random_factors

SHAPES = {"q": (5, 4), "v": (5, 4), "up": (5, 9), "down": (9, 5), "heads": (5, 2, 2)}


def init_pair(specs, shapes=SHAPES, **keywords):
    params = {name: jnp.ones(shapes[name]) for name in specs}
    return init_lora(params, specs, jax.random.key(0), **keywords)


def frozen_factors(pair):
    return {name: leaf.factors for name, leaf in pair.frozen.items()}


def test_weights_of_equal_rank_share_their_matrices():
    specs = dict.fromkeys(SHAPES, VeraSpec(3)) | {"heads": VeraSpec(3, in_axes=[0])}
    factors = frozen_factors(init_pair(specs))
    assert factors["q"]["a"] is factors["v"]["a"] and factors["q"]["b"] is factors["v"]["b"]
    assert factors["q"]["a"] is factors["up"]["a"]
    # A smaller matrix is a slice of the largest.
    np.testing.assert_array_equal(factors["q"]["a"], factors["down"]["a"][:5])
    np.testing.assert_array_equal(factors["q"]["b"], factors["up"]["b"][:, :4])
    np.testing.assert_array_equal(factors["q"]["b"], factors["heads"]["b"].reshape(3, 4))


def test_d_initial_and_dora_do_not_prevent_sharing():
    factors = frozen_factors(
        init_pair({"q": VeraSpec(3), "v": DoraSpec(VeraSpec(3, d_initial=1.0))})
    )
    assert factors["q"]["a"] is factors["v"]["a"]


def test_each_rank_has_its_own_matrices():
    factors = frozen_factors(init_pair({"q": VeraSpec(3), "v": VeraSpec(2)}))
    assert factors["q"]["a"].shape == (5, 3) and factors["v"]["a"].shape == (5, 2)


def test_layers_of_a_stack_share_their_matrices():
    frozen, tunable = init_pair({"w": VeraSpec(3, shared_axes=[0])}, {"w": (7, 5, 4)})
    assert {name: x.shape for name, x in frozen["w"].factors.items()} == {"a": (5, 3), "b": (3, 4)}
    assert tunable["w"].lambda_d.shape == (7, 3) and tunable["w"].lambda_b.shape == (7, 4)


def test_initial_values():
    _, tunable = init_pair({"q": VeraSpec(3), "v": VeraSpec(3, d_initial=0.5)})
    assert (tunable["q"].lambda_d == 0.1).all() and (tunable["v"].lambda_d == 0.5).all()
    assert (tunable["q"].lambda_b == 0).all()


def test_matrices_are_kaiming_uniform():
    factors = frozen_factors(init_pair({"w": VeraSpec(64)}, {"w": (96, 128)}))["w"]
    for matrix, fan_in in ((factors["a"], 96), (factors["b"], 64)):
        bound = np.sqrt(6 / fan_in)
        assert 0.99 * bound < jnp.abs(matrix).max() <= bound
        np.testing.assert_allclose(matrix.std(), bound / np.sqrt(3), rtol=0.02)
        assert abs(matrix.mean()) < 0.02 * bound


def test_delta_is_the_product_of_four_factors():
    pair = init_pair({"q": VeraSpec(3)})
    weight = random_factors(pair.tunable["q"], jax.random.key(1))
    a, b = pair.frozen["q"].factors["a"], pair.frozen["q"].factors["b"]
    delta = a @ jnp.diag(weight.lambda_d) @ b @ jnp.diag(weight.lambda_b)
    merged = merge_params(pair.frozen, {"q": weight})["q"]
    np.testing.assert_allclose(merged, 1 + delta, rtol=1e-5, atol=1e-6)


def test_matrices_have_the_dtype_of_the_factors():
    params = {"q": jnp.ones((5, 4)), "v": jnp.ones((5, 4), jnp.bfloat16)}
    pair = init_lora(params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0))
    assert frozen_factors(pair)["v"]["a"].dtype == jnp.float32
    in_bfloat16 = init_lora(
        params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0), dtype="bfloat16"
    )
    assert frozen_factors(in_bfloat16)["q"]["a"].dtype == jnp.bfloat16


@pytest.mark.devices(2)
def test_weights_with_equal_sharding_share_their_matrices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = {name: jax.device_put(jnp.ones((5, 4)), sharding) for name in "qv"}
    factors = frozen_factors(init_lora(params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0)))
    assert factors["q"]["b"] is factors["v"]["b"]
    assert factors["q"]["b"].sharding.is_equivalent_to(sharding, 2)
    assert factors["q"]["a"].sharding.is_fully_replicated


BAD = {
    "rank 0": (VeraSpec(0), "`q` has a VeraSpec of rank 0; ranks begin at 1"),
    "rank True": (VeraSpec(True), "`q` has rank True; a rank is a positive int"),
    "zero": (VeraSpec(3, d_initial=0), "`q` has d_initial 0; .* other than zero"),
    "string": (VeraSpec(3, d_initial="x"), "`q` has d_initial 'x'; it must be a finite number"),  # pyright: ignore
    "infinite": (VeraSpec(3, d_initial=float("inf")), "`q` has d_initial inf"),
}


@pytest.mark.parametrize("row", BAD)
def test_invalid_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        init_pair({"q": spec})


def test_vector_raises():
    with pytest.raises(SpecError, match="`q` has 1 dimension, so it cannot take VeraSpec"):
        init_pair({"q": VeraSpec(3)}, {"q": (5,)})

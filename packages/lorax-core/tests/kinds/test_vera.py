"""VeRA: one pair of matrices for all weights, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax import DoraSpec, SpecError, VeraSpec, init_lora, merge_params
from lorax.testing import random_factors

SHAPES = {"q": (5, 4), "v": (5, 4), "up": (5, 9), "down": (9, 5), "heads": (5, 2, 2)}


def start(specs, shapes=SHAPES, **keywords):
    params = {name: jnp.ones(shapes[name]) for name in specs}
    return init_lora(params, specs, jax.random.key(0), **keywords)


def held(pair):
    return {name: leaf.factors for name, leaf in pair.frozen.items()}


def test_all_weights_of_one_rank_share_one_pair():
    specs = dict.fromkeys(SHAPES, VeraSpec(3)) | {"heads": VeraSpec(3, in_axes=[0])}
    factors = held(start(specs))
    assert factors["q"]["a"] is factors["v"]["a"] and factors["q"]["b"] is factors["v"]["b"]
    assert factors["q"]["a"] is factors["up"]["a"]
    # Smaller ones are parts of the larger.
    np.testing.assert_array_equal(factors["q"]["a"], factors["down"]["a"][:5])
    np.testing.assert_array_equal(factors["q"]["b"], factors["up"]["b"][:, :4])
    np.testing.assert_array_equal(factors["q"]["b"], factors["heads"]["b"].reshape(3, 4))


def test_other_first_values_and_norms_share_it_too():
    factors = held(start({"q": VeraSpec(3), "v": DoraSpec(VeraSpec(3, d_initial=1.0))}))
    assert factors["q"]["a"] is factors["v"]["a"]


def test_another_rank_has_another_pair():
    factors = held(start({"q": VeraSpec(3), "v": VeraSpec(2)}))
    assert factors["q"]["a"].shape == (5, 3) and factors["v"]["a"].shape == (5, 2)


def test_layers_of_a_stack_share_it():
    frozen, tunable = start({"w": VeraSpec(3, shared_axes=[0])}, {"w": (7, 5, 4)})
    assert {name: x.shape for name, x in frozen["w"].factors.items()} == {"a": (5, 3), "b": (3, 4)}
    assert tunable["w"].lambda_d.shape == (7, 3) and tunable["w"].lambda_b.shape == (7, 4)


def test_first_values():
    _, tunable = start({"q": VeraSpec(3), "v": VeraSpec(3, d_initial=0.5)})
    assert (tunable["q"].lambda_d == 0.1).all() and (tunable["v"].lambda_d == 0.5).all()
    assert (tunable["q"].lambda_b == 0).all()


def test_the_matrices_are_uniform_within_kaimings_bound():
    factors = held(start({"w": VeraSpec(64)}, {"w": (96, 128)}))["w"]
    for matrix, fan_in in ((factors["a"], 96), (factors["b"], 64)):
        bound = np.sqrt(6 / fan_in)
        assert 0.99 * bound < jnp.abs(matrix).max() <= bound
        np.testing.assert_allclose(matrix.std(), bound / np.sqrt(3), rtol=0.02)
        assert abs(matrix.mean()) < 0.02 * bound


def test_is_the_product_of_its_four_factors():
    pair = start({"q": VeraSpec(3)})
    weight = random_factors(pair.tunable["q"], jax.random.key(1))
    a, b = pair.frozen["q"].factors["a"], pair.frozen["q"].factors["b"]
    delta = a @ jnp.diag(weight.lambda_d) @ b @ jnp.diag(weight.lambda_b)
    merged = merge_params(pair.frozen, {"q": weight})["q"]
    np.testing.assert_allclose(merged, 1 + delta, rtol=1e-5, atol=1e-6)


def test_each_dtype_has_separate_parts():
    params = {"q": jnp.ones((5, 4)), "v": jnp.ones((5, 4), jnp.bfloat16)}
    pair = init_lora(params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0))
    assert held(pair)["v"]["a"].dtype == jnp.float32
    narrow = init_lora(
        params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0), dtype="bfloat16"
    )
    assert held(narrow)["q"]["a"].dtype == jnp.bfloat16


@pytest.mark.devices(2)
def test_weights_sharded_alike_share_it_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = {name: jax.device_put(jnp.ones((5, 4)), sharding) for name in "qv"}
    factors = held(init_lora(params, dict.fromkeys("qv", VeraSpec(3)), jax.random.key(0)))
    assert factors["q"]["b"] is factors["v"]["b"]
    assert factors["q"]["b"].sharding.is_equivalent_to(sharding, 2)
    assert factors["q"]["a"].sharding.is_fully_replicated


BAD = {
    "rank 0": (VeraSpec(0), "`q` has a VeraSpec of rank 0; ranks begin at 1"),
    "rank True": (VeraSpec(True), "`q` has rank True; a rank is a positive int"),
    "nothing to begin with": (VeraSpec(3, d_initial=0), "`q` has d_initial 0; .* other than zero"),
    "no number": (VeraSpec(3, d_initial="x"), "`q` has d_initial 'x'; it must be a finite number"),  # pyright: ignore
    "infinite": (VeraSpec(3, d_initial=float("inf")), "`q` has d_initial inf"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        start({"q": spec})


def test_vectors_raise():
    with pytest.raises(SpecError, match="`q` has 1 dimension, so it cannot take VeraSpec"):
        start({"q": VeraSpec(3)}, {"q": (5,)})

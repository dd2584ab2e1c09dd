"""Native files store adapters for the parameter trees of every framework."""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax_io import load_adapter, save_adapter


class Two(eqx.Module):
    """A module whose leaves include a function."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: object

    def __init__(self, key):
        self.first, self.second = (eqx.nn.Linear(5, 3, key=k) for k in jax.random.split(key))
        self.activation = jax.nn.relu


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.DenseGeneral((2, 7))(x).reshape(-1, 14))


def haiku_params():
    net = hk.transform(lambda x: hk.nets.MLP([7, 3])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 5)))


FRAMEWORKS = {
    "haiku": haiku_params,
    "linen": lambda: Dense().init(jax.random.key(0), jnp.ones((1, 5))),
    "nnx": lambda: nnx.state(nnx.Linear(5, 3, rngs=nnx.Rngs(0))),
    "equinox": lambda: Two(jax.random.key(0)),
    "list": lambda: [(jnp.ones((5, 3)), None), {"b": jnp.zeros(3)}],
    "leaf": lambda: jnp.ones((5, 3)),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_trees_of_every_framework_round_trip(tmp_path, framework):
    file = tmp_path / "adapter.safetensors"
    params = FRAMEWORKS[framework]()
    spec = lorax.simple_spec(params, lambda path, leaf: 2, tune_vectors=True)
    _, tunable = lorax.init_lora(params, spec, jax.random.key(1))
    save_adapter(file, tunable, base=params)
    loaded = load_adapter(file, params=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(tunable)
    assert jax.tree.leaves(tunable)
    for actual, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(tunable), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)

"""An unmodified model of each framework: adapted, trained, merged, saved and loaded."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
import lorax_io

IN, HIDDEN, OUT = 5, 11, 3


def from_linen():
    model = nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(OUT)])
    return model.apply, model.init(jax.random.PRNGKey(0), jnp.ones((1, IN)))


def from_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(IN, HIDDEN, rngs=rngs), nnx.relu, nnx.Linear(HIDDEN, OUT, rngs=rngs)
    )
    graph, params = nnx.split(model)
    return lambda params, x: nnx.merge(graph, params)(x), params


def from_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([HIDDEN, OUT])(x)))
    return model.apply, model.init(jax.random.PRNGKey(0), jnp.ones((1, IN)))


def from_equinox():
    model = eqx.nn.MLP(IN, OUT, HIDDEN, depth=1, key=jax.random.PRNGKey(0))
    return lambda model, x: jax.vmap(model)(x), model


@pytest.mark.parametrize("make", [from_linen, from_nnx, from_haiku, from_equinox])
def test_train_merge_save_load(make, tmp_path):
    apply, params = make()
    x = jax.random.normal(jax.random.PRNGKey(1), (7, IN))
    lora_apply = lorax.lora(apply, on_materialize="error", on_unused="error")
    spec = lorax.infer_spec(apply, params, x, rank=2)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.PRNGKey(2))
    np.testing.assert_array_equal(lora_apply((frozen, tunable), x), apply(params, x))

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(tunable, state):
        loss = lambda tunable: jnp.mean((lora_apply((frozen, tunable), x) - 1) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(tunable)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(tunable, updates), state, value

    state, values = optimizer.init(tunable), []
    for _ in range(20):
        tunable, state, value = step(tunable, state)
        values.append(value)
    assert values[-1] < 0.9 * values[0]

    trained = lora_apply((frozen, tunable), x)
    merged = apply(lorax.merge_params(frozen, tunable), x)
    np.testing.assert_allclose(trained, merged, rtol=1e-5, atol=1e-5)

    lorax_io.save_adapter(tmp_path / "adapter", tunable)
    loaded = lorax_io.load_adapter(tmp_path / "adapter", like=tunable)
    np.testing.assert_array_equal(lora_apply((frozen, loaded), x), trained)

"""The layers of Equinox, each in a small network."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal, tokens

KEYS = jax.random.split(KEY, 6)


@model("MLP", transforms=True)
def mlp() -> Subject:
    module = eqx.nn.MLP(5, 3, 11, depth=2, key=KEY)
    return equinox(module, lambda module, x: jax.vmap(module)(x), normal(7, 5))


@model("convolutions, grouped and transposed")
def convolutions() -> Subject:
    layers = [
        eqx.nn.Conv2d(3, 8, 3, padding="SAME", key=KEYS[0]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.Conv2d(8, 12, 3, groups=4, stride=2, key=KEYS[1]),
        eqx.nn.GroupNorm(3, 12),
        eqx.nn.ConvTranspose2d(12, 5, 2, stride=2, key=KEYS[2]),
    ]
    call = lambda module, x: jax.vmap(module)(x)  # noqa: E731
    return equinox(eqx.nn.Sequential(layers), call, normal(2, 3, 9, 9))


@model("attention over an embedding")
def attention() -> Subject:
    module = {
        "table": eqx.nn.Embedding(17, 12, key=KEYS[0]),
        "attend": eqx.nn.MultiheadAttention(3, 12, use_query_bias=True, key=KEYS[1]),
        "head": eqx.nn.Linear(12, 5, key=KEYS[2]),
    }

    def call(module: Any, ids: jax.Array) -> jax.Array:
        x = jax.vmap(module["table"])(ids)
        mask = jnp.tril(jnp.ones((ids.size, ids.size), bool))
        return jax.vmap(module["head"])(x + module["attend"](x, x, x, mask))

    one = equinox(module, call, tokens(17, 7))
    return Subject(
        lambda p, ids: jax.vmap(lambda i: one.fn(p, i))(ids), one.params, (tokens(17, 2, 7),)
    )


@model("GRU and LSTM")
def recurrent() -> Subject:
    module = {
        "gru": eqx.nn.GRUCell(5, 8, key=KEYS[0]),
        "lstm": eqx.nn.LSTMCell(8, 6, key=KEYS[1]),
        "head": eqx.nn.Linear(6, 3, key=KEYS[2]),
    }

    def call(module: Any, x: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> Any:
            h, state = carry
            h = module["gru"](x, h)
            state = module["lstm"](h, state)
            return (h, state), module["head"](state[0])

        zeros = jnp.zeros(6, x.dtype)
        return jax.lax.scan(step, (jnp.zeros(8, x.dtype), (zeros, zeros)), x)[1]

    return equinox(module, call, normal(9, 5))


@model("weight norm")
def weight_norm() -> Subject:
    layers = [
        eqx.nn.WeightNorm(eqx.nn.Linear(5, 11, key=KEYS[0])),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.WeightNorm(eqx.nn.Linear(11, 3, key=KEYS[1])),
    ]
    call = lambda module, x: jax.vmap(module)(x)  # noqa: E731
    return equinox(eqx.nn.Sequential(layers), call, normal(7, 5))


@model("spectral norm")
def spectral_norm() -> Subject:
    layer = eqx.nn.Linear(5, 11, key=KEYS[0])
    module, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", key=KEYS[1])
    leaves, structure = jax.tree.flatten(state)

    def call(module: Any, x: jax.Array) -> jax.Array:
        fresh = jax.tree.unflatten(structure, leaves)  # Equinox takes a state once.
        return jax.vmap(lambda x: module(x, fresh)[0])(x)

    return equinox(module, call, normal(7, 5))

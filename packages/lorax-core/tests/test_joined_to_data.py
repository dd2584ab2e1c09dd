"""Adapters on parameters that are joined to data: materialized there, and then data themselves."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import MaterializeWarning, explain, init_lora, lora, quantize, testing

SHAPES = {"embed": (7, 11), "w": (11, 13), "prefix": (3, 11)}
X = jnp.linspace(-1, 1, 21).reshape(3, 7)


def attended(p, tokens):
    for _ in range(2):
        query = tokens @ p["w"]
        tokens = tokens + jax.nn.softmax(query @ query.T) @ tokens
    return tokens


# How `prefix` is joined to data, and the primitive that joins it.
ROWS = {
    "concatenated": (lambda x, prefix: jnp.concatenate([prefix, x]), "concatenate"),
    "stacked": (lambda x, prefix: jnp.stack([prefix, x]).sum(0), "stack"),
    "where": (lambda x, prefix: jnp.where(x[:, :1] > 0, prefix, x), "select_n"),
    "written": (
        lambda x, prefix: lax.dynamic_update_slice(x, prefix, (0, 0)),
        "dynamic_update_slice",
    ),
    "set": (lambda x, prefix: x.at[jnp.array([1, 0, 2])].set(prefix), "scatter"),
    "added": (lambda x, prefix: x.at[jnp.array([1, 0, 2])].add(prefix), "scatter-add"),
    "in-a-call": (jax.jit(lambda x, prefix: jnp.concatenate([prefix, x])), "concatenate"),
    "in-a-vmap": (
        lambda x, prefix: jax.vmap(lambda x: jnp.concatenate([prefix, x[None]]))(x)[0],
        "concatenate",
    ),
}


def params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.random.normal(key, shape) / 3
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def model_of(join):
    return lambda p, x: attended(p, join(jnp.tanh(x @ p["embed"]), p["prefix"]))


@pytest.mark.parametrize("row", ROWS)
def test_only_the_joined_parameter_is_materialized(row):
    join, primitive = ROWS[row]
    model = model_of(join)
    pair = init_lora(params(), dict.fromkeys(SHAPES, 2), jax.random.key(1))
    rows = {r.path: (r.status, r.uses) for r in explain(model, pair, X).rows}
    if primitive == "stack" and "concatenate" in str(rows):
        primitive = "concatenate"  # JAX < 0.10
    assert rows["prefix"] == ("materialized", (primitive,))
    assert rows["w"] == ("covered", ("dot_general ×2",))
    assert rows["embed"] == ("covered", ("dot_general",))
    with pytest.warns(
        MaterializeWarning, match=rf"`prefix` is used by `{primitive}` .*joins it with data"
    ):
        lora(model)(pair, X)


def test_values_and_gradients_after_joining():
    join, _ = ROWS["concatenated"]
    spec = {"embed": 0, "w": 0, "prefix": 2}
    testing.check(model_of(join), params(), spec, X, materializes=True, transforms=False)


def test_joined_to_data_that_no_weight_has_multiplied():
    """Such data could be part of a weight; here another weight multiplies both."""

    def model(p, x):
        return attended(p, jnp.concatenate([p["prefix"], x]))

    pair = init_lora(params(), {"embed": 0, "w": 2, "prefix": 2}, jax.random.key(1))
    statuses = {r.path: r.status for r in explain(model, pair, jnp.ones((4, 11))).rows}
    assert statuses == {"prefix": "materialized", "w": "covered"}


def test_joined_to_an_argument_that_is_used_as_a_weight():
    def model(p, more, x):
        return x @ jnp.concatenate([p["w"], more], 1)

    testing.check(model, {"w": params()["w"]}, {"w": 2}, jnp.ones((11, 4)), jnp.ones((3, 11)))


def test_codes_joined_to_data_are_decoded():
    join, _ = ROWS["concatenated"]
    frozen = quantize(params(), dict.fromkeys(SHAPES, "int8"))
    explanation = explain(model_of(join), (frozen, dict.fromkeys(SHAPES)), X)
    assert [(path, primitive) for path, primitive, _ in explanation.decoded] == [
        ("prefix", "concatenate")
    ]

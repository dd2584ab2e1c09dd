"""Adapters on what a function puts beside data: it is built there, and what follows is data."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax import MaterializeWarning, explain, init_lora, lora, quantize, testing

SHAPES = {"embed": (7, 11), "w": (11, 13), "left": (3, 11)}
X = jnp.linspace(-1, 1, 21).reshape(3, 7)


def attended(p, tokens):
    for _ in range(2):
        query = tokens @ p["w"]
        tokens = tokens + jax.nn.softmax(query @ query.T) @ tokens
    return tokens


# How `left` comes to be beside data, and the primitive that puts it there.
ROWS = {
    "concatenated": (lambda x, left: jnp.concatenate([left, x]), "concatenate"),
    "stacked": (lambda x, left: jnp.stack([left, x]).sum(0), "stack"),
    "where": (lambda x, left: jnp.where(x[:, :1] > 0, left, x), "select_n"),
    "written": (lambda x, left: lax.dynamic_update_slice(x, left, (0, 0)), "dynamic_update_slice"),
    "set": (lambda x, left: x.at[jnp.array([1, 0, 2])].set(left), "scatter"),
    "added": (lambda x, left: x.at[jnp.array([1, 0, 2])].add(left), "scatter-add"),
    "in-a-call": (jax.jit(lambda x, left: jnp.concatenate([left, x])), "concatenate"),
    "in-a-vmap": (
        lambda x, left: jax.vmap(lambda x: jnp.concatenate([left, x[None]]))(x)[0],
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
    return lambda p, x: attended(p, join(jnp.tanh(x @ p["embed"]), p["left"]))


@pytest.mark.parametrize("row", ROWS)
def test_only_the_token_is_materialized(row):
    join, primitive = ROWS[row]
    model = model_of(join)
    pair = init_lora(params(), dict.fromkeys(SHAPES, 2), jax.random.key(1))
    rows = {r.path: (r.status, r.uses) for r in explain(model, pair, X).rows}
    if primitive == "stack" and "concatenate" in str(rows):
        primitive = "concatenate"  # JAX < 0.10
    assert rows["left"] == ("materialized", (primitive,))
    assert rows["w"] == ("covered", ("dot_general ×2",))
    assert rows["embed"] == ("covered", ("dot_general",))
    with pytest.warns(MaterializeWarning, match=rf"`left` is used by `{primitive}` .*beside data"):
        lora(model)(pair, X)


def test_values_and_gradients():
    join, _ = ROWS["concatenated"]
    spec = {"embed": 0, "w": 0, "left": 2}
    testing.check(model_of(join), params(), spec, X, materializes=True, transforms=False)


def test_with_data_that_no_weight_has_multiplied():
    """Such data may be a part of a weight; here another weight maps both."""

    def model(p, x):
        return attended(p, jnp.concatenate([p["left"], x]))

    pair = init_lora(params(), {"embed": 0, "w": 2, "left": 2}, jax.random.key(1))
    statuses = {r.path: r.status for r in explain(model, pair, jnp.ones((4, 11))).rows}
    assert statuses == {"left": "materialized", "w": "covered"}


def test_beside_another_argument_that_is_used_as_a_weight():
    def model(p, more, x):
        return x @ jnp.concatenate([p["w"], more], 1)

    testing.check(model, {"w": params()["w"]}, {"w": 2}, jnp.ones((11, 4)), jnp.ones((3, 11)))


def test_codes_concatenated_with_data_are_decoded_there():
    join, _ = ROWS["concatenated"]
    frozen = quantize(params(), dict.fromkeys(SHAPES, "int8"))
    explanation = explain(model_of(join), (frozen, dict.fromkeys(SHAPES)), X)
    assert [(path, primitive) for path, primitive, _ in explanation.decoded] == [
        ("left", "concatenate")
    ]

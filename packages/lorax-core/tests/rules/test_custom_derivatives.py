"""Weights in functions with a custom derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import MaterializeWarning, explain, init_lora, lora, merge_params, testing
from lorax._transform import bind_call, trace, uses

W = {"w": (11, 7)}
THROUGH = {"through_custom_derivatives": True}
MATERIALIZED = {"materializes": True}


@jax.custom_vjp
def layer(w, x) -> Any:
    return jnp.tanh(x @ w)


def _layer_forward(w, x):
    y = layer(w, x)
    return y, (w, x, y)


def _layer_backward(saved, g):
    w, x, y = saved
    g = g * (1 - y**2)
    return x.T @ g, g @ w.T


layer.defvjp(_layer_forward, _layer_backward)


@jax.custom_jvp
def jvp_layer(w, x) -> Any:
    return jnp.sin(x @ w)


@jvp_layer.defjvp
def _jvp_layer_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return jnp.sin(x @ w), jnp.cos(x @ w) * (x @ dw + dx @ w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def applied(change, w, x) -> Any:
    return change(x @ w), x.sum()


applied.defvjp(
    lambda change, w, x: (applied(change, w, x), (w, x)),
    lambda change, saved, g: (
        saved[1].T @ (g[0] * jnp.cos(saved[1] @ saved[0])),
        (g[0] * jnp.cos(saved[1] @ saved[0])) @ saved[0].T + g[1],
    ),
)


@jax.custom_jvp
def straight_through(w):
    return jnp.round(w)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


def in_a_scan(p, x):
    def step(x, _):
        return layer(p["w"], x), None

    return jax.lax.scan(step, x, None, length=3)[0]


def nondiff(p, x):
    y, _ = jax.tree.leaves(applied(jnp.sin, p["w"], x))
    return y


MODELS: dict[str, Any] = {
    "custom-vjp": (lambda p, x: layer(p["w"], x), W, (3, 11)),
    "custom-jvp": (lambda p, x: jvp_layer(p["w"], x), W, (3, 11)),
    "nondiff-arguments": (nondiff, W, (3, 11)),
    "jitted": (lambda p, x: jax.jit(layer)(p["w"], x), W, (3, 11)),
    "in-a-scan": (in_a_scan, {"w": (7, 7)}, (3, 7)),
    "under-vmap": (lambda p, x: jax.vmap(lambda x: layer(p["w"], x))(x), W, (2, 3, 11)),
    "twice": (lambda p, x: layer(p["v"], layer(p["w"], x)), {"w": (11, 7), "v": (7, 5)}, (3, 11)),
}


@pytest.mark.parametrize("name", MODELS)
def test_option_sees_through_a_custom_derivative(check_row, name):
    fn, shapes, x = MODELS[name]
    check_row(name, fn, shapes, dict.fromkeys(shapes, 2), [x], THROUGH)


@pytest.mark.parametrize("name", MODELS)
def test_weight_is_materialized_by_default(check_row, name):
    fn, shapes, x = MODELS[name]
    check_row(name, fn, shapes, dict.fromkeys(shapes, 2), [x], MATERIALIZED | {"transforms": False})


def make_pair():
    params = {"w": jax.random.normal(jax.random.key(0), (11, 7))}
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(1))
    return frozen, testing.random_factors(tunable, jax.random.key(2))


def test_the_warning_names_the_option():
    with pytest.warns(MaterializeWarning, match="through_custom_derivatives=True"):
        lora(lambda p, x: layer(p["w"], x))(make_pair(), jnp.ones((3, 11)))


def test_custom_rule_of_a_call_without_weights_is_kept():
    def fn(p, x):
        return straight_through(layer(p["w"], x) * 3)

    frozen, tunable = make_pair()
    x = jax.random.normal(jax.random.key(3), (3, 11))
    adapted = lora(fn, through_custom_derivatives=True)
    got = jax.grad(lambda t: adapted((frozen, t), x).sum())(tunable)["w"]
    expected = jax.grad(lambda t: fn(merge_params(frozen, t), x).sum())(tunable)["w"]
    assert np.abs(expected.a).max() > 0.1
    assert np.allclose(got.a, expected.a, atol=1e-4) and np.allclose(got.b, expected.b, atol=1e-4)


def test_custom_rule_that_is_not_a_derivative_is_lost():
    """The weight is materialized inside, and the derivative of rounding is zero."""

    def fn(p, x):
        return x @ straight_through(p["w"] * 3)

    frozen, tunable = make_pair()
    x = jnp.ones((3, 11))
    for through, largest in ((False, 0.1), (True, 0.0)):
        adapted = lora(fn, on_materialize="allow", through_custom_derivatives=through)
        assert np.allclose(adapted((frozen, tunable), x), fn(merge_params(frozen, tunable), x))
        gradient = jax.grad(lambda t, f=adapted: f((frozen, t), x).sum())(tunable)["w"]
        assert (np.abs(gradient.a).max() > largest) == (not through)
    with pytest.raises(AssertionError, match="value and gradient"):
        testing.check(
            fn, merge_params(frozen, tunable), {"w": 2}, x, materializes=True, transforms=False,
            through_custom_derivatives=True,
        )  # fmt: skip


def test_explain_sees_through_a_custom_derivative():
    x = jnp.ones((3, 11))
    fn = MODELS["custom-vjp"][0]
    assert explain(fn, make_pair(), x).rows[0].status == "materialized"
    (row,) = explain(fn, make_pair(), x, through_custom_derivatives=True).rows
    assert (row.status, row.uses) == ("covered", ("dot_general",))


def test_uses_see_through_a_custom_derivative():
    fn = MODELS["custom-vjp"][0]
    traced = trace(fn, bind_call(fn, (0,), (), (make_pair(), jnp.ones((3, 11))), {}))
    (use,) = uses(traced, through_custom_derivatives=True)
    assert (use.kind, use.primitive) == ("product", "dot_general")

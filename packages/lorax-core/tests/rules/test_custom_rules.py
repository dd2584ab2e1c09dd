"""A rule for a kernel of a user's own, written with what `lorax.rules` exports."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from lorax import (
    LORA_FULL,
    DoraSpec,
    LoraSpec,
    MaterializeError,
    MaterializeWarning,
    init_lora,
    lora,
    rules,
    testing,
)
from lorax._registry import RULES
from lorax.rules import add_product, defrule, is_weight

COLUMNS = (((1,), (0,)), ((), ()))


def matmul_kernel(x, w, out):
    out[...] = x[...] @ w[...]


def on_chip(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(matmul_kernel, out_shape=shape, interpret=True)(x, w)


@jax.custom_vjp
def matmul(x, w):
    return on_chip(x, w)


matmul.defvjp(lambda x, w: (on_chip(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def model(params, x):
    return matmul(jnp.tanh(matmul(x, params["up"])), params["down"])


def params():
    up, down = jax.random.split(jax.random.key(0))
    return {"up": jax.random.normal(up, (8, 16)) / 3, "down": jax.random.normal(down, (16, 5)) / 4}


X = jax.random.normal(jax.random.key(1), (3, 8))


@pytest.fixture
def with_rule():
    def rule(eqn, x, weight, **params):
        kernel = params["jaxpr"].debug_info.func_src_info
        if not kernel.startswith("matmul_kernel ") or is_weight(x):
            return NotImplemented
        eqn.use(weight, "product")
        return [add_product(matmul(x, weight.base), x, weight, COLUMNS)]

    defrule(pl.pallas_call_p)(rule)
    yield
    del RULES[pl.pallas_call_p]


def test_a_kernel_without_a_rule_gets_the_weight():
    pair = init_lora(params(), {"up": 2, "down": 3}, jax.random.key(0))
    adapted = lora(model, through_custom_derivatives=True, on_materialize="error")
    with pytest.raises(MaterializeError, match="`up` is used by `pallas_call`"):
        adapted(pair, X)


@pytest.mark.usefixtures("with_rule")
def test_a_kernel_with_a_rule_materializes_no_weight():
    spec = {"up": 2, "down": LoraSpec(3, alpha=5)}
    testing.check(model, params(), spec, X, through_custom_derivatives=True)


@pytest.mark.usefixtures("with_rule")
def test_gains_that_the_rule_does_not_take_are_materialized_with_a_warning():
    pair = init_lora(params(), {"up": DoraSpec(LoraSpec(2)), "down": LORA_FULL}, jax.random.key(0))
    with pytest.warns(MaterializeWarning, match="`up` is used by `pallas_call`.* with a gain"):
        lora(lambda params, x: on_chip(x, params["up"]) + 0 * params["down"].sum())(pair, X)


@pytest.mark.usefixtures("with_rule")
def test_another_kernel_is_not_covered():
    def doubled(x, w, out):
        out[...] = 2 * x[...] @ w[...]

    def other(params, x):
        shape = jax.ShapeDtypeStruct((3, 16), x.dtype)
        return pl.pallas_call(doubled, out_shape=shape, interpret=True)(x, params["up"])

    pair = init_lora(params(), {"up": 2, "down": 0}, jax.random.key(0))
    with pytest.raises(MaterializeError, match="`up` is used by `pallas_call`"):
        lora(other, on_materialize="error")(pair, X)


def test_public_names_of_extensions_show_their_module():
    from lorax import bases, kinds

    for module in (bases, kinds, rules):
        for name in module.__all__:
            value = getattr(module, name)
            assert inspect.isclass(value) or inspect.isfunction(value)
            assert value.__module__ == module.__name__, name

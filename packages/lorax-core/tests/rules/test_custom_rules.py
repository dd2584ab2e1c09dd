"""A user's rule for a Pallas kernel, written with the public names of `lorax.rules`."""

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
    testing,
)
from lorax._registry import RULES
from lorax.rules import add_product, defrule, is_weight

COLUMNS = (((1,), (0,)), ((), ()))


def matmul_kernel(x, w, out):
    out[...] = x[...] @ w[...]


def pallas_matmul(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(matmul_kernel, out_shape=shape, interpret=True)(x, w)


@jax.custom_vjp
def matmul(x, w):
    return pallas_matmul(x, w)


matmul.defvjp(
    lambda x, w: (pallas_matmul(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


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


def test_kernel_without_a_rule_materializes():
    pair = init_lora(params(), {"up": 2, "down": 3}, jax.random.key(0))
    adapted = lora(model, through_custom_derivatives=True, on_materialize="error")
    with pytest.raises(MaterializeError, match="`up` is used by `pallas_call`"):
        adapted(pair, X)


@pytest.mark.usefixtures("with_rule")
def test_kernel_with_a_rule_does_not_materialize():
    spec = {"up": 2, "down": LoraSpec(3, alpha=5)}
    testing.check(model, params(), spec, X, through_custom_derivatives=True)


@pytest.mark.usefixtures("with_rule")
def test_gain_under_a_custom_rule_materializes_and_warns():
    pair = init_lora(params(), {"up": DoraSpec(LoraSpec(2)), "down": LORA_FULL}, jax.random.key(0))
    with pytest.warns(MaterializeWarning, match="`up` is used by `pallas_call`.* with a gain"):
        lora(lambda params, x: pallas_matmul(x, params["up"]) + 0 * params["down"].sum())(pair, X)


@pytest.mark.usefixtures("with_rule")
def test_rule_does_not_cover_another_kernel():
    def doubled(x, w, out):
        out[...] = 2 * x[...] @ w[...]

    def other(params, x):
        shape = jax.ShapeDtypeStruct((3, 16), x.dtype)
        return pl.pallas_call(doubled, out_shape=shape, interpret=True)(x, params["up"])

    pair = init_lora(params(), {"up": 2, "down": 0}, jax.random.key(0))
    with pytest.raises(MaterializeError, match="`up` is used by `pallas_call`"):
        lora(other, on_materialize="error")(pair, X)

"""The barrier before an equation that decodes codes, and the operands that it covers."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest

from lorax import lora, quantize


def operands_behind_barrier(format):
    """For each operand of the product, whether a barrier precedes it without another equation."""
    weight = quantize({"w": jnp.ones((64, 5))}, {"w": format})
    product = lora(lambda params, x: jnp.tanh(x) @ params["w"])
    jaxpr = jax.make_jaxpr(product)((weight, {"w": None}), jnp.ones((3, 64)))
    (inner,) = [e.params["jaxpr"] for e in jaxpr.eqns if "jaxpr" in e.params and has_product(e)]
    sources = {out: eqn.primitive.name for eqn in inner.eqns for out in eqn.outvars}
    (product,) = [eqn for eqn in inner.eqns if eqn.primitive.name == "dot_general"]
    assert "optimization_barrier" in sources.values()
    return [sources.get(v) == "optimization_barrier" for v in product.invars]


def has_product(eqn):
    inner = eqn.params["jaxpr"]
    return isinstance(inner, jex.Jaxpr) and "dot_general" in str(inner)


@pytest.mark.parametrize("format, waits", [("nf4", True), ("int4", True), ("int8", False)])
def test_barrier_covers_the_other_operand_of_unpacked_codes(format, waits):
    assert operands_behind_barrier(format)[0] == waits

"""Entrywise functions of codes as one equation: transformations, and a form for each platform."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.bases import mxfp4
from lorax.bases._entrywise import entrywise

CODES = jnp.arange(255, dtype=jnp.uint8).reshape(5, 51)
doubled = entrywise(
    "doubled",
    lambda codes, *, dtype: 2 * codes.astype(dtype),
    tpu=lambda codes, *, dtype: codes.astype(dtype) + codes.astype(dtype),
)
FLOAT = jnp.dtype(jnp.float32)


def test_is_one_equation_under_transformations():
    expected = 2 * np.asarray(CODES, np.float32)
    function = lambda codes: doubled(codes, dtype=FLOAT)  # noqa: E731
    assert [eqn.primitive.name for eqn in jax.make_jaxpr(function)(CODES).eqns] == ["doubled"]
    for run in (function, jax.jit(function), jax.vmap(function), jax.checkpoint(function)):
        np.testing.assert_array_equal(run(CODES), expected)
        with jax.disable_jit():
            np.testing.assert_array_equal(run(CODES), expected)
    gradient = jax.grad(lambda x: (x * function(CODES)).sum())(jnp.ones(CODES.shape))
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_each_platform_gets_its_form(platform):
    function = jax.jit(lambda codes: doubled(codes, dtype=FLOAT))
    module = jax.export.export(function, platforms=[platform])(CODES).mlir_module()
    assert ("stablehlo.add" in module) == (platform == "tpu")


@pytest.mark.devices(2)
def test_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        codes = jax.device_put(CODES[:4], jax.P("x"))
        out = jax.jit(lambda codes: doubled(codes, dtype=FLOAT))(codes)
        power = jax.jit(lambda codes: mxfp4._power(codes, dtype=FLOAT))(codes)
    assert out.sharding.spec == power.sharding.spec == jax.P("x", None)
    np.testing.assert_array_equal(out, 2 * np.asarray(CODES[:4], np.float32))
    np.testing.assert_array_equal(power, mxfp4._power(CODES[:4], dtype=FLOAT))


def test_powers_of_two():
    powers = np.asarray(mxfp4._power(CODES, dtype=FLOAT))
    np.testing.assert_array_equal(powers, np.ldexp(np.float32(1), np.asarray(CODES, int) - 127))
    assert np.isnan(mxfp4._power(jnp.uint8(255), dtype=FLOAT))

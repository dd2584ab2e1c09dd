"""Lookup in a table of 16 entries, in the form for each platform."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.bases import _table

TABLE = tuple(np.linspace(-1, 1, 16).astype(np.float32).tolist())
CODES = jnp.arange(32, dtype=jnp.int32).reshape(4, 8).astype(jnp.uint4)


@pytest.mark.parametrize("form", [_table._by_gather, _table._by_selects])
def test_every_form_reads_the_table(form):
    entries = form(CODES, table=TABLE, dtype=jnp.dtype(jnp.float32))
    expected = np.asarray(TABLE, np.float32)[np.asarray(CODES).astype(int)]
    np.testing.assert_array_equal(entries, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_tpu_uses_selects_and_others_a_gather(platform):
    read = jax.jit(functools.partial(_table.read, table=TABLE, dtype=jnp.float32))
    module = jax.export.export(read, platforms=[platform])(CODES).mlir_module()
    assert ("stablehlo.gather" in module) == (platform != "tpu")
    assert ("stablehlo.select" in module) == (platform == "tpu")

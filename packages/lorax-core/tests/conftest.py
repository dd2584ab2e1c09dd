"""Shared by all tests of the core: strict JAX, several CPU devices, the runner of table rows."""

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import testing

# A silent upcast or a silent broadcast in a rule is a bug: JAX raises instead.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# For shard_map and explicit meshes; it must be set before the first array exists.
if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)
# Almost all the time of these tests is XLA compiling tiny programs.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    parser.addoption(
        "--without-transforms",
        action="store_true",
        help="check the rows of the tables without vmap, checkpoint and scan",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "devices(count): needs that many devices")
    config.addinivalue_line(
        "markers", "full_product: a combination that only one CI job runs; the others run a sample"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--without-transforms"):
        deselected = [item for item in items if item.get_closest_marker("full_product")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("full_product")]


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("devices")
    if marker and jax.device_count() < marker.args[0]:
        kind = jax.devices()[0].device_kind
        pytest.skip(f"needs {marker.args[0]} devices; there are {jax.device_count()} of {kind}")


def draw(key, leaf):
    """A random array for a shape or a `jax.ShapeDtypeStruct`; anything else as it is."""
    if isinstance(leaf, np.ndarray):
        return jnp.asarray(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape, dtype = leaf.shape, leaf.dtype
    elif is_shape(leaf):
        shape, dtype = leaf, jnp.float32
    else:
        return leaf
    exact = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
    return jax.random.normal(key, shape, exact).astype(dtype)


def is_shape(leaf):
    return isinstance(leaf, tuple) and all(type(size) is int for size in leaf)


def is_float(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def draw_tree(seed, tree):
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    return jax.tree.unflatten(structure, list(map(draw, keys, leaves)))


@pytest.fixture
def check_row(request):
    """Checks a table row: (id, function, shapes of the parameters, spec, arguments, expectation).

    The expectation, which most rows omit, holds keywords of `lorax.testing.check`, or
    `"sizes": False` to skip its check for weight-sized arrays. That check mistakes an activation
    for a weight where a product sums over part of an axis, or over axes of both sides: the result
    still depends on axes of both sides.
    """

    options = {"transforms": False} if request.config.getoption("--without-transforms") else {}

    def run(name, fn, shapes, spec, args, expectation=None):
        seed = zlib.crc32(name.encode())
        params, *args = draw_tree(seed, [shapes, *args])
        # With small arguments, a model's tanh does not saturate.
        args = [arg / 4 if is_float(arg) else arg for arg in args]
        keywords = (expectation or {}) | options
        with pytest.MonkeyPatch.context() as patch:
            if not keywords.pop("sizes", True):
                patch.setattr(testing, "weight_sized", lambda *_, **__: {})
            testing.check(fn, params, spec, *args, seed=seed % 1000, **keywords)

    return run

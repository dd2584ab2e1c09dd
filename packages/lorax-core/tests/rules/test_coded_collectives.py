"""Collectives on quantized weights: those that only move entries move codes and scales."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lorax
from lorax import NF4, Int4, Int8, dequantize, init_lora, lora, quantize
from lorax.bases import NVFP4, Format
from lorax.testing import random_factors

pytestmark = pytest.mark.devices(8)

DEVICES, INPUTS, OUTPUTS = 8, 1024, 24
RING = [(k, (k + 3) % DEVICES) for k in range(DEVICES)]
GROUPS = [[0, 3, 5, 6], [2, 1, 7, 4]]

MOVES = {
    "all-gather": lambda w: lax.all_gather(w, "d", axis=0, tiled=True),
    "all-gather-outputs": lambda w: lax.all_gather(w, "d", axis=1, tiled=True),
    "all-gather-stacked": lambda w: lax.all_gather(w, "d", axis=1),
    "all-to-all": lambda w: lax.all_to_all(w, "d", 1, 0, tiled=True),
    "all-to-all-outputs": lambda w: lax.all_to_all(w, "d", 1, 1, tiled=True),
    "all-to-all-stacked": lambda w: lax.all_to_all(w.reshape(128, 8, 3), "d", 1, 1),
    "ppermute": lambda w: lax.ppermute(w, "d", RING),
    "ppermute-to-some": lambda w: lax.ppermute(w, "d", RING[:3]),
    "ppermute-a-cast": lambda w: lax.ppermute(-w.astype(jnp.bfloat16), "d", RING[:3]),
    "ppermute-of-a-part": lambda w: lax.ppermute(
        lax.dynamic_slice_in_dim(w, lax.axis_index("d"), 5, 1).T, "d", RING
    ),
    "pshuffle": lambda w: lax.pshuffle(w, "d", [3, 1, 2, 0, 7, 6, 5, 4]),
}
IN_GROUPS = {
    "all-gather-in-groups": lambda w: lax.all_gather(
        w, "d", axis=0, tiled=True, axis_index_groups=GROUPS
    ),
    "all-to-all-in-groups": lambda w: lax.all_to_all(
        w, "d", 1, 0, tiled=True, axis_index_groups=GROUPS
    ),
}
# These need floats: they sum, are not linear, differ between devices, or split a block.
DECODED = {
    "psum": lambda w: lax.psum(w, "d"),
    "psum-scatter": lambda w: lax.psum_scatter(w, "d", scatter_dimension=1, tiled=True),
    "ppermute-of-an-exponential": lambda w: lax.ppermute(jnp.exp(w), "d", RING[:3]),
    "all-to-all-of-a-multiple": lambda w: lax.all_to_all(
        w * lax.axis_index("d").astype(w.dtype), "d", 1, 0, tiled=True
    ),
    "all-gather-of-a-multiple": lambda w: lax.all_gather(
        w * lax.axis_index("d").astype(w.dtype), "d"
    ),
    "all-to-all-within-blocks": lambda w: lax.all_to_all(w, "d", 0, 1, tiled=True),
}
FORMATS = {"nf4": NF4(64), "nvfp4": NVFP4(), "int8": Int8(), "int4": Int4(32, symmetric=False)}


def of_shards(change, check_vma=True):
    """A function that returns the change of each device's shard."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    body = lambda w: change(w)[None]  # noqa: E731
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)
    return lambda params: mapped(params["w"])


def coded(format: Format):
    w = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS)) / 32
    return quantize({"w": w}, {"w": format})


def floats_between_devices(fn, *args):
    """The sizes of the float arrays that collectives take."""
    sizes = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if "axis_name" in eqn.params or "axes" in eqn.params and "psum" in eqn.primitive.name:
                sizes.extend(
                    math.prod(v.aval.shape)
                    for v in eqn.invars
                    if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype.itemsize > 1
                )
            for value in eqn.params.values():
                for body in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(body, "eqns") or hasattr(body, "jaxpr"):
                        walk(getattr(body, "jaxpr", body))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return sizes


def compare(change, format, check_vma, moves):
    fn, frozen = of_shards(change, check_vma), coded(format)
    bare = lora(fn, on_materialize="error")
    pair = frozen, {"w": None}
    np.testing.assert_array_equal(jax.jit(bare)(pair), jax.jit(fn)(dequantize(frozen)))
    sizes = floats_between_devices(bare, pair)
    # A shard of the weight has 3072 entries, and as many codes are moved.
    assert (max(sizes, default=0) < INPUTS // DEVICES * OUTPUTS // 2) == moves, sizes


@pytest.mark.parametrize("name", MOVES)
def test_collectives_that_move_entries_move_codes(name):
    compare(MOVES[name], FORMATS["nf4"], True, True)


@pytest.mark.full_product
@pytest.mark.parametrize("format", ["nvfp4", "int8", "int4"])
@pytest.mark.parametrize("name", ["all-gather-stacked", "all-to-all", "ppermute-to-some"])
def test_other_formats_move_codes(name, format):
    compare(MOVES[name], FORMATS[format], True, True)


@pytest.mark.parametrize("name", [*IN_GROUPS, "all-to-all", "ppermute-to-some"])
def test_codes_are_moved_without_check_vma(name):
    compare((MOVES | IN_GROUPS)[name], FORMATS["nf4"], False, True)


@pytest.mark.parametrize("name", DECODED)
def test_collectives_that_need_floats_decode_and_report(name):
    change, format = DECODED[name], FORMATS["nf4"]
    compare(change, format, True, False)
    fn, frozen = of_shards(change), coded(format)
    assert [path for path, *_ in lorax.explain(fn, (frozen, {"w": None})).decoded] == ["w"]
    _, tunable = init_lora(frozen, {"w": 2}, jax.random.key(1))
    with pytest.raises(lorax.MaterializeError, match="`w` is"):
        lora(fn, on_materialize="error")((frozen, tunable))


@pytest.mark.parametrize("name", ["all-gather", "all-to-all", "ppermute-to-some", "psum"])
def test_adapter_on_codes_that_are_moved(name):
    change = (MOVES | DECODED)[name]

    def product(w):
        w = change(w)
        return jnp.cos(jnp.arange(3.0 * w.shape[0])).reshape(3, -1) @ w

    fn, frozen = of_shards(product), coded(FORMATS["nf4"])
    _, tunable = init_lora(frozen, {"w": 2}, jax.random.key(1))
    tunable = random_factors(tunable, jax.random.key(2))
    policy = "allow" if name == "psum" else "error"

    def loss(tunable, frozen):
        return jnp.mean(lora(fn, on_materialize=policy)((frozen, tunable)) ** 2)

    run = jax.jit(jax.value_and_grad(loss))
    got, expected = run(tunable, frozen), run(tunable, dequantize(frozen))
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

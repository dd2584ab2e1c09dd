"""Codes and scales on meshes: sharded, constrained, split and gathered like their weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax
from lorax import FP8, NF4, Int4, Int8, dequantize, init_lora, lora, quantize
from lorax.testing import random_factors

pytestmark = pytest.mark.devices(4)

NIBBLES, SQUARES = NF4(64), FP8(block=2, square=True)
FORMATS = [NIBBLES, pytest.param(SQUARES, marks=pytest.mark.full_product)]
MORE = [
    pytest.param(format, marks=pytest.mark.full_product) for format in (Int8(), Int4(32, False))
]
W = jax.random.normal(jax.random.key(0), (128, 8)) / 8
X = jax.random.normal(jax.random.key(1), (4, 128))


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))


def quantized_pair(mesh, format):
    placed = jax.device_put(W, NamedSharding(mesh, P("a", "b")))
    coded = quantize({"w": placed}, {"w": format})
    _, tunable = init_lora(coded, {"w": 2}, jax.random.key(2))
    return coded, random_factors(tunable, jax.random.key(3))


def compare(function, coded, tunable, x):
    plain = dequantize(coded)
    for adapter in ({"w": None}, tunable):

        def loss(data, frozen, adapter=adapter):
            out = lora(function, on_materialize="error")((frozen, adapter), data)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.grad(loss, has_aux=True))
        got, expected = run(x, coded), run(x, plain)
        for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [*FORMATS, *MORE], ids=str)
def test_codes_are_sharded_like_the_weight(format):
    coded, tunable = quantized_pair(mesh_of(AxisType.Auto), format)
    weight = coded["w"]
    assert weight.sharding.spec == P("a", "b")
    assert dequantize(coded)["w"].sharding.spec == P("a", "b")
    codes = weight.arrays["codes"]
    assert codes.sharding.shard_shape(codes.shape)[0] == codes.shape[0] // 2
    assert 4 * codes.addressable_shards[0].data.size == codes.size
    assert tunable["w"].a.sharding.spec == P("a", None)
    assert tunable["w"].b.sharding.spec == P(None, "b")


def constrained(sharding, p, x):
    return x @ jax.lax.with_sharding_constraint(p["w"], sharding)


def constrained_after_a_move(sharding, p, x):
    return x @ jax.lax.with_sharding_constraint(p["w"].T, sharding).T


def placed(sharding, p, x):
    return x @ jax.device_put(p["w"], sharding)


def split(mesh, p, x):
    product = lambda x, w: jax.lax.psum(x @ w, "a")  # noqa: E731
    specs = (P(None, "a"), P("a", "b"))
    return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P(None, "b"))(x, p["w"])


def gathered(mesh, p, x):
    product = lambda x, w: x @ jax.lax.all_gather(w, "a", axis=0, tiled=True)  # noqa: E731
    specs = (P("a", None), P("a", "b"))
    return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P("a", "b"))(x, p["w"])


def split_after_a_number(mesh, p, x):
    return split(mesh, {"w": p["w"] * jnp.sin(x[0, 0])}, x)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("use", "spec"),
    [
        (constrained, P(None, "a")),
        (constrained_after_a_move, P("a", None)),
        (placed, P(None, "a")),
        (split, None),
        (split_after_a_number, None),
        (gathered, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_under_automatic_axes(use, spec, format):
    mesh = mesh_of(AxisType.Auto)
    where = mesh if spec is None else NamedSharding(mesh, spec)
    compare(functools.partial(use, where), *quantized_pair(mesh, format), X)


EXPLICIT = {
    "product": lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P(None, "b")),
    "resharded": lambda p, x: jnp.einsum(
        "bi,io->bo", x, jax.sharding.reshard(p["w"], P("a", None)), out_sharding=P(None, None)
    ),
    "transposed": lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"].T, out_sharding=P(None, "b")),
}


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("use", EXPLICIT)
def test_under_explicit_axes(use, format):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, P(None, "a"))
        compare(EXPLICIT[use], *quantized_pair(mesh, format), x)


def test_blocks_that_do_not_divide_a_shard_raise():
    placed = jax.device_put(W, NamedSharding(mesh_of(AxisType.Explicit), P(("a", "b"))))
    message = (
        r"`w` has shape \(128, 8\), .* 4 parts of 32 over .* 'a', 'b', which blocks of 64 do not"
    )
    with pytest.raises(lorax.SpecError, match=message):
        quantize({"w": placed}, {"w": NF4(64)})
    with pytest.raises(lorax.SpecError, match=message):
        init_lora({"w": placed}, {"w": lorax.LoraSpec(2, init="loftq")}, jax.random.key(0))
    small_blocks = quantize({"w": placed}, {"w": NF4(32)})["w"]
    assert small_blocks.sharding.spec == P(("a", "b"), None)
    assert dequantize({"w": small_blocks})["w"].sharding.spec == P(("a", "b"), None)


def test_gathers_codes_and_not_floats():
    """At most a byte for each entry of the weight crosses devices."""
    mesh = mesh_of(AxisType.Auto)
    coded, tunable = quantized_pair(mesh, Int8())
    function = lora(functools.partial(gathered, mesh))
    traced = str(jax.make_jaxpr(function)((coded, tunable), X))
    made = [line for line in traced.splitlines() if "all_gather[" in line]
    assert made and not [line for line in made if "f32[128,4]" in line or "f32[2,64,4]" in line]


def test_more_shards_than_blocks_materialize():
    mesh = mesh_of(AxisType.Auto)
    coded = quantize({"w": W}, {"w": NF4(128)})
    pair = init_lora(coded, {"w": 2}, jax.random.key(0))
    with pytest.raises(lorax.MaterializeError, match="splits 1 blocks of codes over the axis 'a'"):
        lora(functools.partial(split, mesh), on_materialize="error")(pair, X)
    got = jax.jit(lora(functools.partial(split, mesh)))((coded, {"w": None}), X)
    np.testing.assert_allclose(got, X @ dequantize(coded)["w"], rtol=1e-5, atol=1e-5)

"""`shard_map` on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import LoraSpec, init_lora, lora, merge_params, testing

STACKED = LoraSpec(2, shared_axes=[0])


def sharded(mesh, in_specs, out_specs, body):
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return lambda p, x: mapped(p["w"], x)


def on_devices(count, shapes, x_shape, specs=None, axis_type=AxisType.Auto):
    """A mesh, with parameters and an argument placed on it, by default replicated."""
    mesh = jax.make_mesh((count,), ("d",), axis_types=(axis_type,))
    w_spec, x_spec = specs or (P(), P())
    keys = iter(jax.random.split(jax.random.key(9), 8))
    place = lambda shape, spec: jax.device_put(  # noqa: E731
        jax.random.normal(next(keys), shape) / 4, NamedSharding(mesh, spec)
    )
    return (
        mesh,
        {name: place(shape, w_spec) for name, shape in shapes.items()},
        place(x_shape, x_spec),
    )


def summed_over_devices(w, x):
    return lax.psum(x @ w, "d")


SHARDED = [
    ("outputs", (P(None, "d"), P()), P(None, "d"), lambda w, x: x @ w),
    ("inputs", (P("d", None), P(None, "d")), P(), summed_over_devices),
    ("data", (P(), P("d")), P("d"), lambda w, x: jnp.tanh(x @ w)),
    ("data-and-gradient", (P(), P("d")), P("d"), lambda w, x: jax.grad(
        lambda x: jnp.sin(x @ w).sum())(x)),
    ("replicated", (P(), P()), P(), lambda w, x: x @ w),
    ("nested-jit", (P(None, "d"), P()), P(None, "d"), jax.jit(lambda w, x: jnp.tanh(x @ w))),
]  # fmt: skip


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.devices(4))])
@pytest.mark.parametrize("row", SHARDED, ids=lambda row: row[0])
def test_shard_map(row, devices):
    _, in_specs, out_specs, body = row
    mesh, params, x = on_devices(devices, {"w": (12, 20)}, (8, 12))
    testing.check(sharded(mesh, in_specs, out_specs, body), params, {"w": 3}, x, transforms=False)


@pytest.mark.devices(4)
@pytest.mark.parametrize("row", SHARDED[:3], ids=lambda row: row[0])
def test_shard_map_on_an_explicit_mesh(row):
    _, in_specs, out_specs, body = row
    mesh, params, x = on_devices(4, {"w": (12, 20)}, (8, 12), in_specs, AxisType.Explicit)
    with jax.set_mesh(mesh):
        frozen, tunable = init_lora(params, {"w": 3}, jax.random.key(1))
        tunable = jax.tree.map(lambda leaf: leaf + 0.5, tunable)
        fn = sharded(mesh, in_specs, out_specs, body)
        got = jax.jit(lora(fn, on_materialize="error"))((frozen, tunable), x)
        assert np.allclose(got, fn(merge_params(frozen, tunable), x), rtol=1e-5, atol=1e-5)


@pytest.mark.devices(2)
@pytest.mark.parametrize(
    "spec", [STACKED, LoraSpec(2, in_axes=[0, 1]), LoraSpec(2, in_axes=[1])], ids=["ab", "a", "b"]
)
def test_shard_map_over_a_stack(spec):
    mesh, params, x = on_devices(2, {"w": (4, 11, 7)}, (4, 3, 11))
    product = lambda w, x: jnp.einsum("ebi,eio->ebo", x, w)  # noqa: E731
    fn = sharded(mesh, (P("d"), P("d")), P("d"), product)
    testing.check(fn, params, {"w": spec}, x, transforms=False)

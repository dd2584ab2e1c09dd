"""Collectives on weights that the user has sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from lorax import LoraSpec, init_lora, lora, merge_params, testing

GROUPS = [[0, 3], [2, 1]]


def product(x, w):
    return jnp.einsum("bi,...io->...bo", x, w)


# What the body does with its shard of w [16, 20] before the product. `SPLITS` says which axis of w
# is sharded, and `d` is that axis.
CHANGES = {
    "all-gather": lambda w, d: lax.all_gather(w, "d", axis=d, tiled=True),
    "all-gather-another-axis": lambda w, d: lax.all_gather(w, "d", axis=1 - d, tiled=True),
    "all-gather-stacked": lambda w, d: lax.all_gather(w, "d", axis=d),
    "psum": lambda w, d: lax.psum(w, "d"),
    "pmean": lambda w, d: lax.pmean(w, "d"),
    "psum-scatter": lambda w, d: lax.psum_scatter(w, "d", scatter_dimension=1 - d, tiled=True),
    "all-to-all": lambda w, d: lax.all_to_all(w, "d", 1 - d, d, tiled=True),
    "all-to-all-one-axis": lambda w, d: lax.all_to_all(w, "d", 1 - d, 1 - d, tiled=True),
    "all-to-all-stacked": lambda w, d: lax.all_to_all(w.reshape(-1, 4, 5), "d", 1, 1),
    "ppermute": lambda w, d: lax.ppermute(w, "d", [(0, 1), (1, 2), (2, 3), (3, 0)]),
    "ppermute-to-some": lambda w, d: lax.ppermute(w, "d", [(0, 1), (3, 2)]),
}
# Only with check_vma=False: otherwise JAX does not support groups.
IN_GROUPS = {
    "all-gather-in-groups": lambda w, d: lax.all_gather(
        w, "d", axis=d, tiled=True, axis_index_groups=GROUPS
    ),
    "psum-in-groups": lambda w, d: lax.psum(w, "d", axis_index_groups=GROUPS),
    "psum-scatter-in-groups": lambda w, d: lax.psum_scatter(
        w, "d", scatter_dimension=1 - d, axis_index_groups=GROUPS, tiled=True
    ),
    "all-to-all-in-groups": lambda w, d: lax.all_to_all(
        w, "d", 1 - d, d, axis_index_groups=GROUPS, tiled=True
    ),
}
STACKED = [CHANGES["all-gather-stacked"], CHANGES["all-to-all-stacked"]]
SPLITS = {"inputs": (P("d"), 0), "outputs": (P(None, "d"), 1), "nothing": (P(), 0)}


def on_four_devices(change, split, check_vma):
    """A model that multiplies the changed weight by distinct numbers, so every entry counts."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec, axis = SPLITS[split]

    def body(w, x):
        w = change(w, axis)
        coefficients = jnp.cos(jnp.arange(w.shape[-2] * 3, dtype=jnp.float32))
        x = x[0, 0] + coefficients.reshape(3, w.shape[-2])
        return product(x, w)[None]

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(spec, P("d")), out_specs=P("d"), check_vma=check_vma
    )
    return lambda p, x: mapped(p["w"], x)


def check_on_devices(change, split, check_vma):
    fn = on_four_devices(change, split, check_vma)
    params = {"w": jax.random.normal(jax.random.key(0), (16, 20))}
    x = jnp.arange(4.0).reshape(4, 1) / 4
    with pytest.MonkeyPatch.context() as patch:
        if change in STACKED:
            # The product sums over part of an axis, so its result would count as weight-sized.
            patch.setattr(testing, "weight_sized", lambda *_, **__: {})
        testing.check(fn, params, {"w": 2}, x, transforms=False)


@pytest.mark.devices(4)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CHANGES)
def test_collectives(name, split):
    check_on_devices(CHANGES[name], split, check_vma=True)


@pytest.mark.devices(4)
@pytest.mark.parametrize("split", ["inputs", "outputs"])
@pytest.mark.parametrize("name", {**CHANGES, **IN_GROUPS})
def test_collectives_without_check_vma(name, split):
    check_on_devices((CHANGES | IN_GROUPS)[name], split, check_vma=False)


@pytest.mark.devices(4)
@pytest.mark.parametrize("split_axis, concat_axis", [(0, 1), (0, 2), (1, 0), (1, 1)])
@pytest.mark.parametrize("split", SPLITS)
def test_stacked_all_to_all_between_two_axes(split, split_axis, concat_axis):
    """Only values: JAX (0.8 to 0.12) has no gradient where the two axes differ."""

    def change(w, _):
        shape = (4, -1, 5) if split_axis == 0 else (-1, 4, 5)
        return lax.all_to_all(w.reshape(shape), "d", split_axis, concat_axis)

    fn = on_four_devices(change, split, check_vma=True)
    params = {"w": jax.random.normal(jax.random.key(0), (16, 20))}
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(1))
    tunable = testing.random_factors(tunable, jax.random.key(2))
    x = jnp.arange(4.0).reshape(4, 1)
    got = jax.jit(lora(fn, on_materialize="error"))((frozen, tunable), x)
    expected = jax.jit(lambda t: fn(merge_params(frozen, t), x))(tunable)
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.devices(4)
def test_hand_written_full_sharding():
    """Each device stores a quarter of every kernel, and gathers the kernel where it is used."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def body(p, x):
        for name in ("w", "v"):
            x = jnp.tanh(x @ lax.all_gather(p[name], "d", axis=0, tiled=True))
        return x

    fn = jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (12, 20)) / 4,
        "v": jax.random.normal(keys[1], (20, 7)) / 4,
    }
    x = jax.random.normal(keys[2], (8, 12))
    testing.check(fn, params, {"w": 3, "v": 2}, x, transforms=False)


def test_under_a_named_vmap():
    """A named `vmap` does not report which factors vary."""

    def fn(p, x):
        return x @ lax.all_gather(p["w"], "d", axis=0, tiled=True)

    params = {"w": jax.random.normal(jax.random.key(0), (3, 4, 7))}
    spec = {"w": LoraSpec(2, shared_axes=[0])}
    frozen, tunable = init_lora(params, spec, jax.random.key(1))
    tunable = testing.random_factors(tunable, jax.random.key(2))
    x = jax.random.normal(jax.random.key(3), (3, 2, 12))
    mapped = jax.vmap(fn, axis_name="d")
    # `vmap` maps over the entries of the adapter, as over those of the base.
    alone = jax.tree.map(
        lambda w: dataclasses.replace(w, shared_axes=(), in_axes=(0,), out_axes=(1,)),
        tunable,
        is_leaf=lambda leaf: hasattr(leaf, "rank"),
    )
    got = jax.vmap(lora(fn, on_materialize="error"), axis_name="d")((frozen, alone), x)
    assert np.allclose(got, mapped(merge_params(frozen, tunable), x), rtol=1e-4, atol=1e-4)

"""`merge_params`, `unmerge` and `materialize`: values, copies, placement, and errors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import (
    LORA_FULL,
    DoraSpec,
    IA3Spec,
    LoraSpec,
    LoraWeight,
    PairError,
    count_params,
    dequantize,
    init_lora,
    materialize,
    merge_params,
    quantize,
    select_adapters,
    stack_adapters,
    unmerge,
    with_dropout,
)
from lorax.testing import random_factors

KEY = jax.random.key(0)


def buffers(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def donating_step(tunable):
    """A training step that donates, and so deletes, its argument."""
    return jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(tunable)


def pair(shape=(5, 7), spec: Any = 2, dtype=jnp.float32):
    params = {"w": jax.random.normal(jax.random.key(1), shape).astype(dtype), "v": jnp.ones(3)}
    frozen, tunable = init_lora(params, {"w": spec, "v": LORA_FULL}, jax.random.key(0))
    return frozen, random_factors(tunable, jax.random.key(2))


@pytest.mark.parametrize(
    ("shape", "spec", "delta"),
    [
        ((5, 7), LoraSpec(2), "ir,ro->io"),
        ((5, 7), LoraSpec(2, in_axes=[1]), "or,ri->io"),
        ((5, 3, 7), LoraSpec(2), "hkr,rd->hkd"),
        ((5, 3, 7), LoraSpec(2, in_axes=[0]), "dr,rhk->dhk"),
        ((3, 5, 7), LoraSpec(2, shared_axes=[0]), "lir,lro->lio"),
        ((5, 3, 7), LoraSpec(2, shared_axes=[1]), "lir,lro->ilo"),
        ((3, 2, 5, 7), LoraSpec(2), "hwir,ro->hwio"),
    ],
)
@pytest.mark.parametrize(
    ("alpha", "scaling", "scale"),
    [(None, "standard", 1), (6, "standard", 3), (6, "rslora", 6 / 2**0.5)],
)
def test_delta_is_scale_times_a_times_b(shape, spec, delta, alpha, scaling, scale):
    spec = LoraSpec(spec.rank, alpha, scaling, spec.in_axes, spec.out_axes, spec.shared_axes)
    frozen, tunable = pair(shape, spec)
    weight = tunable["w"]
    expected = frozen["w"] + scale * jnp.einsum(delta, weight.a, weight.b)
    assert weight.scale == pytest.approx(scale)
    assert jnp.allclose(merge_params(frozen, tunable)["w"], expected, atol=1e-5)


def test_sums_in_float32_and_casts_to_the_base():
    frozen, tunable = pair(dtype=jnp.bfloat16)
    merged = merge_params(frozen, tunable)["w"]
    weight = tunable["w"]
    exact = frozen["w"].astype(jnp.float32) + weight.a @ weight.b
    assert merged.dtype == jnp.bfloat16
    assert (merged == exact.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16, jnp.complex64])
def test_every_floating_dtype_merges(dtype):
    frozen, tunable = pair(dtype=dtype)
    assert merge_params(frozen, tunable)["w"].dtype == dtype


def test_frozen_leaves_are_not_copied_and_tunable_leaves_are():
    frozen, tunable = pair()
    frozen |= {"other": jnp.ones(3)}
    tunable |= {"other": None}
    merged = merge_params(frozen, tunable)
    assert merged["other"] is frozen["other"]
    assert not buffers(merged["v"]) & buffers(tunable["v"])
    assert (merged["v"] == tunable["v"]).all() and not frozen["w"].is_deleted()


def test_merged_parameters_survive_a_donating_step():
    frozen, tunable = pair()
    merged = merge_params(frozen, tunable)
    before = jax.device_get(merged)
    jax.block_until_ready(donating_step(tunable))
    assert tunable["v"].is_deleted() and tunable["w"].a.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, merged, before)


def test_donation_frees_only_the_base():
    frozen, tunable = pair()
    expected = merge_params(frozen, tunable)["w"]
    merged = merge_params(frozen, tunable, donate=True)
    assert (merged["w"] == expected).all()
    assert frozen["w"].is_deleted()
    assert not tunable["w"].a.is_deleted() and not tunable["v"].is_deleted()


def test_donation_keeps_a_weight_that_is_at_two_paths():
    w = jnp.ones((5, 7))
    frozen, tunable = init_lora({"w": w, "tied": w, "kept": w}, {"w": 2, "tied": 2, "kept": 0}, KEY)
    merged = merge_params(frozen, tunable, donate=True)
    assert merged["kept"] is w and (merged["w"] == 1).all() and (merged["tied"] == 1).all()


def test_unmerge_restores_the_base():
    frozen, tunable = pair()
    restored = unmerge(merge_params(frozen, tunable), tunable)
    assert jnp.allclose(restored["w"], frozen["w"], atol=1e-6) and restored["v"] is None
    assert not jnp.allclose(merge_params(frozen, tunable)["w"], frozen["w"], atol=0.1)


def test_unmerge_of_codes_raises():
    params = {"w": jnp.ones((6, 5))}
    frozen, tunable = init_lora(quantize(params, {"w": "int8"}), {"w": 2}, jax.random.key(0))
    coded, _ = merge_params(frozen, tunable, requantize=True)
    with pytest.raises(PairError, match="unmerge: `w` is quantized"):
        unmerge(coded, tunable)
    assert unmerge(dequantize(coded), tunable)["w"].shape == (6, 5)


def test_unmerge_of_another_structure_raises():
    with pytest.raises(PairError, match="unmerge: params and tunable"):
        unmerge({"w": jnp.ones(3)}, {"v": None})


def test_merge_under_jit():
    frozen, tunable = pair()
    assert jnp.allclose(
        jax.jit(merge_params)(frozen, tunable)["w"], merge_params(frozen, tunable)["w"]
    )


def test_materialize_one_weight():
    weight = LoraWeight(jnp.ones((5, 1)), jnp.ones((1, 7)), rank=1, alpha=3.0)
    assert (materialize(jnp.ones((5, 7)), weight) == 4).all()


@pytest.mark.devices(4)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_stay_sharded(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, P("x", "y"))
    base = jax.device_put(jnp.ones((4, 6)), sharding)
    with jax.set_mesh(mesh):
        frozen, tunable = init_lora({"w": base}, {"w": 2}, jax.random.key(0), b_init="gaussian")
        merged = merge_params(frozen, tunable)
    assert merged["w"].sharding == sharding
    a, b = jax.device_get((tunable["w"].a, tunable["w"].b))
    assert jnp.allclose(jax.device_get(merged["w"]), 1 + a @ b, atol=1e-5)


def factors(dtype=jnp.float32):
    a, b = (jax.random.normal(jax.random.key(k), shape) for k, shape in ((1, (4, 2)), (2, (2, 8))))
    return LoraWeight(a.astype(dtype), b.astype(dtype), 2, 3.0)


def mesh_of(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,))


def placed_on(weight, mesh, a=None, b=None):
    put = lambda factor, spec: jax.device_put(factor, NamedSharding(mesh, spec or P()))  # noqa: E731
    return dataclasses.replace(weight, a=put(weight.a, a), b=put(weight.b, b))


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@pytest.mark.devices(4)
@KINDS
@pytest.mark.parametrize("specs", [(P(), P()), (P("x"), P()), (P(), P(None, "x"))])
@pytest.mark.parametrize(
    "base",
    [np.ones((4, 8), np.float32), *(jnp.ones((4, 8), d) for d in ("f4", "bfloat16", "complex64"))],
    ids=["numpy", "float32", "bfloat16", "complex64"],
)
@pytest.mark.parametrize("donate", [False, True])
def test_an_uncommitted_base_is_moved_to_its_factors(kind, specs, base, donate):
    """As after data-parallel training, where the base was never placed on the mesh."""
    base = base.copy()
    weight = factors()
    placed = placed_on(weight, mesh_of(kind), *specs)
    expected = merge_params({"w": base}, {"w": weight})["w"]
    expected_sharding = (jnp.ones((4, 8)) + placed.a @ placed.b).sharding
    merged = merge_params({"w": base}, {"w": placed}, donate=donate)["w"]
    np.testing.assert_allclose(jax.device_get(merged), expected, rtol=1e-6)
    assert merged.dtype == base.dtype and merged.sharding == expected_sharding
    restored = unmerge({"w": merged}, {"w": placed})["w"]
    np.testing.assert_allclose(jax.device_get(abs(restored).astype(jnp.float32)), 1, atol=0.05)
    if isinstance(base, jax.Array):
        assert base.is_deleted() == donate
    if not donate:
        unmerge({"w": base}, {"w": placed})
        materialize(base, placed)


@pytest.mark.devices(4)
@KINDS
def test_an_uncommitted_base_merges_under_the_mesh(kind):
    base, weight, mesh = jnp.ones((4, 8)), factors(), mesh_of(kind)
    expected = materialize(base, weight)
    placed = placed_on(weight, mesh, P("x"))
    with jax.set_mesh(mesh):
        eager = merge_params({"w": base}, {"w": placed})["w"]
        jitted = jax.jit(merge_params)({"w": base}, {"w": placed})["w"]
    for merged in (eager, jitted):
        np.testing.assert_allclose(jax.device_get(merged), expected, rtol=1e-6)


@pytest.mark.parametrize("donate", [False, True])
def test_uncommitted_arrays_stay_uncommitted(donate):
    frozen, tunable = pair()
    merged = merge_params(frozen, tunable, donate=donate)
    assert not merged["w"].committed and not merged["v"].committed
    assert not unmerge(merged, tunable)["w"].committed


@pytest.mark.devices(4)
def test_a_base_is_not_moved_to_another_device():
    mesh, weight = mesh_of(AxisType.Auto), factors()
    placed = NamedSharding(mesh, P(None, "x"))
    for sharding in (placed, jax.sharding.SingleDeviceSharding(jax.devices()[2])):
        merged = merge_params({"w": jax.device_put(jnp.ones((4, 8)), sharding)}, {"w": weight})["w"]
        assert merged.committed and merged.sharding == sharding
    base = jax.device_put(jnp.ones((4, 8)), placed)
    merged = merge_params({"w": base}, {"w": placed_on(weight, mesh, P("x"))})["w"]
    assert merged.sharding == placed


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("function", "name"), [(merge_params, "merge_params"), (unmerge, "unmerge")]
)
def test_factors_on_other_devices_than_the_base_raise(function, name):
    base = {"layer": {"w": jax.device_put(jnp.ones((4, 8)), jax.devices()[0])}}
    tunable = {"layer": {"w": placed_on(factors(), mesh_of(AxisType.Auto))}}
    message = (
        rf"{name}: the base at `layer/w` is committed to \S+, and its factors are .* 4 devices"
    )
    with pytest.raises(PairError, match=message):
        function(base, tunable)


@pytest.mark.devices(4)
@pytest.mark.parametrize("donate", [False, True])
def test_a_base_in_host_memory_stays_there(donate):
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("x"), memory_kind="pinned_host")
    if "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        pytest.skip("this backend has no pinned host memory")
    base, weight = jax.device_put(jnp.ones((4, 8)), sharding), factors()
    expected = materialize(jnp.ones((4, 8)), weight)
    _, tunable = init_lora({"w": base}, {"w": 2}, KEY)
    assert tunable["w"].a.sharding.memory_kind == "pinned_host"
    placed = dataclasses.replace(tunable["w"], alpha=3.0, a=weight.a, b=weight.b)
    merged = merge_params({"w": base}, {"w": placed}, donate=donate)["w"]
    assert merged.sharding == sharding and base.is_deleted() == donate
    np.testing.assert_allclose(jax.device_get(merged), expected, rtol=1e-6)
    assert merge_params({"w": merged}, tunable)["w"].sharding == sharding


@pytest.mark.parametrize(
    ("frozen", "tunable", "message"),
    [
        ({"w": 1}, {"v": 1}, "must both have the structure"),
        (
            {"w": LoraWeight(jnp.ones((2, 1)), jnp.ones((1, 2)), 1)},
            {"w": jnp.ones((2, 2))},
            "merge_params: frozen and tunable are swapped: the first tree has the adapters",
        ),
        ({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, "`w` is in frozen and in tunable"),
        (
            {"w": None},
            {"w": LoraWeight(jnp.ones((2, 1)), jnp.ones((1, 2)), 1)},
            "instead of its base",
        ),
        (
            {"w": jnp.ones((3, 2))},
            {"w": LoraWeight(jnp.ones((2, 1)), jnp.ones((1, 2)), 1)},
            r"`w` has a \(2, 1\) and b \(1, 2\), which do not fit a base of shape \(3, 2\)",
        ),
        (
            {"w": jnp.ones((2, 2, 2))},
            {"w": LoraWeight(jnp.ones((2, 1)), jnp.ones((1, 2)), 1)},
            "do not fit a base",
        ),
    ],
)
def test_non_pair_raises(frozen, tunable, message):
    with pytest.raises(PairError, match=message):
        merge_params(frozen, tunable)


def test_count_params_counts_arrays():
    _, tunable = pair()
    assert count_params(tunable) == 5 * 2 + 2 * 7 + 3
    assert count_params([jax.nn.relu, None, "x", jax.ShapeDtypeStruct((2, 3), jnp.int8)]) == 6


def test_takes_a_pair_or_its_two_trees():
    pair = init_lora({"w": jnp.ones((3, 2))}, {"w": 1}, jax.random.key(0))
    assert (merge_params(pair)["w"] == merge_params(*pair)["w"]).all()
    assert (merge_params(tuple(pair))["w"] == merge_params(*pair)["w"]).all()
    with pytest.raises(PairError, match=r"takes a pair, as `init_lora` returns it, or its two tre"):
        merge_params(pair.frozen)
    with pytest.raises(PairError, match="unmerge: the first tree has adapters"):
        unmerge(*reversed(pair))


@pytest.mark.parametrize("scale", [0, 0.3, -2.0])
@pytest.mark.parametrize(
    "spec", [LoraSpec(2, alpha=3), DoraSpec(LoraSpec(2)), IA3Spec()], ids=lambda s: type(s).__name__
)
def test_merge_scales_the_delta(spec, scale):
    params = {"w": jnp.arange(20.0).reshape(5, 4) / 7, "b": jnp.ones(4)}
    frozen, tunable = init_lora(params, {"w": spec, "b": 0}, jax.random.key(0))
    tunable = random_factors(tunable, jax.random.key(1))
    delta = merge_params(frozen, tunable)["w"] - params["w"]
    merged = merge_params(frozen, tunable, scale=scale)
    np.testing.assert_allclose(merged["w"], params["w"] + scale * delta, rtol=1e-5, atol=1e-5)
    assert merged["b"] is params["b"]
    if scale == 0:
        assert (merged["w"] == params["w"]).all()


def test_invalid_scale_raises():
    frozen, tunable = init_lora({"w": jnp.eye(3)}, {"w": LORA_FULL}, jax.random.key(0))
    with pytest.raises(PairError, match="scale is 0.5, and `w` is trained in full"):
        merge_params(frozen, tunable, scale=0.5)
    bad: tuple[Any, ...] = (float("nan"), "1", None)
    for scale in bad:
        with pytest.raises(ValueError, match="finite number"):
            merge_params(frozen, tunable, scale=scale)


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        (jnp.ones((8, 6)), None, r"do not fit a base of shape \(8, 6\)"),
        (None, None, "NoneType there instead of its base"),
        (jnp.ones((9, 6), jnp.int32), None, "whose base holds int32"),
        (jnp.ones((9, 6)), DoraSpec(LoraSpec(2)), r"needs square \(6,\) next to its base"),
    ],
    ids=["shape", "none", "integers", "no norm"],
)
def test_adapter_that_does_not_fit_its_base_raises(base, adapter, message):
    spec = LoraSpec(2) if adapter is None else adapter
    weight = init_lora({"w": jnp.ones((9, 6))}, {"w": spec}, jax.random.key(0)).tunable["w"]
    with pytest.raises(PairError, match=message):
        materialize(base, weight)
    with pytest.raises(PairError, match=message):
        merge_params({"w": base}, {"w": weight})
    if adapter is None:
        with pytest.raises(PairError, match=message):
            unmerge({"w": base}, {"w": weight})


def test_materialize_of_trees_raises():
    pair = init_lora({"w": jnp.ones((9, 6))}, {"w": 2}, jax.random.key(0))
    with pytest.raises(PairError, match="materialize takes a leaf of frozen and the adapter"):
        materialize(*pair)


def test_count_params_ignores_dropout_and_selection():
    tunable = init_lora({"w": jnp.ones((9, 6))}, {"w": 2}, jax.random.key(0)).tunable
    bank = stack_adapters([tunable, tunable])
    for tree in (with_dropout(tunable, jax.random.key(1), 0.5), select_adapters(bank, 1)):
        assert count_params(tree) == count_params(tunable) == 30

"""`init_lora`: initial factors, dtypes, copies of full leaves, and placement."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax import LORA_FREEZE, LORA_FULL, LoraSpec, SpecError, init_lora, merge_params


def key():
    return jax.random.key(0)


def test_a_is_uniform_within_its_bound_and_b_is_zero():
    _, tunable = init_lora({"w": jnp.ones((100, 20))}, {"w": 8}, key())
    a, b = tunable["w"].a, tunable["w"].b
    assert 0.09 < float(jnp.abs(a).max()) <= 0.1  # 1/√100
    assert float(jnp.abs(a.mean())) < 0.01
    assert not b.any()


def test_fan_in_is_the_product_of_all_input_axes():
    spec = LoraSpec(4, in_axes=[1, 2], shared_axes=[0])
    _, tunable = init_lora({"w": jnp.ones((3, 4, 25, 7))}, {"w": spec}, key())
    assert 0.09 < float(jnp.abs(tunable["w"].a).max()) <= 0.1


def test_entries_of_a_shared_axis_have_different_factors():
    spec = LoraSpec(2, shared_axes=[0])
    _, tunable = init_lora({"w": jnp.ones((3, 5, 7))}, {"w": spec}, key())
    a = tunable["w"].a
    assert not jnp.allclose(a[0], a[1]) and not jnp.allclose(a[1], a[2])


def test_factors_of_a_leaf_do_not_depend_on_other_leaves():
    one_leaf, _ = {"b": jnp.ones((5, 7))}, None
    three_leaves = {"a": jnp.ones((5, 7)), **one_leaf, "c": jnp.ones((5, 7))}
    _, by_itself = init_lora(one_leaf, {"b": 2}, key())
    _, with_others = init_lora(three_leaves, {"a": 2, "b": 2, "c": 2}, key())
    assert (by_itself["b"].a == with_others["b"].a).all()
    assert not jnp.allclose(with_others["a"].a, with_others["b"].a)


def test_old_style_keys_work():
    _, tunable = init_lora({"w": jnp.ones((5, 7))}, {"w": 2}, jax.random.PRNGKey(0))
    assert tunable["w"].a.shape == (5, 2)


@pytest.mark.parametrize("name", ["uniform", "gaussian", "orthogonal", "zeros"])
def test_initializers_by_name(name):
    _, tunable = init_lora({"w": jnp.ones((400, 300))}, {"w": 4}, key(), a_init=name, b_init=name)
    a, b = tunable["w"].a, tunable["w"].b
    expected = {"uniform": 0.05 / 3**0.5, "gaussian": 0.25, "orthogonal": 0.05, "zeros": 0.0}[name]
    assert float(a.std()) == pytest.approx(expected, rel=0.1)
    assert b.any() == (name != "zeros")


def test_initializer_functions_get_the_shape_of_one_entry():
    calls = []

    def init(key, shape, dtype):
        calls.append((shape, dtype))
        return jnp.full(shape, 3, dtype)

    spec = LoraSpec(2, in_axes=[1, 2], shared_axes=[0])
    _, tunable = init_lora({"w": jnp.ones((3, 4, 5, 7))}, {"w": spec}, key(), a_init=init)
    assert calls == [((20, 2), jnp.float32)]
    assert tunable["w"].a.shape == (3, 4, 5, 2) and (tunable["w"].a == 3).all()
    init_lora({"w": jnp.ones((5, 7))}, {"w": 2}, key(), a_init=jax.nn.initializers.he_normal())


def test_unknown_initializer_raises():
    with pytest.raises(SpecError, match="a_init='unifrom' is unknown; it must be one of 'uniform'"):
        init_lora({"w": jnp.ones((5, 7))}, {"w": 2}, key(), a_init="unifrom")


@pytest.mark.parametrize(
    ("base", "factors"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_factors_are_at_least_float32(base, factors):
    _, tunable = init_lora({"w": jnp.ones((5, 7), base)}, {"w": 2}, key())
    assert tunable["w"].a.dtype == tunable["w"].b.dtype == factors


def test_factors_of_float64_weights_are_float64():
    with jax.enable_x64(True):
        _, tunable = init_lora({"w": jnp.ones((5, 7), jnp.float64)}, {"w": 2}, key())
        assert tunable["w"].a.dtype == jnp.float64


def test_dtype_option():
    _, tunable = init_lora({"w": jnp.ones((5, 7))}, {"w": 2}, key(), dtype=jnp.bfloat16)
    assert tunable["w"].a.dtype == jnp.bfloat16


def test_frozen_leaves_are_not_copied_and_full_leaves_are():
    params = {"w": jnp.ones((5, 7)), "v": jnp.ones(7), "n": np.ones(3), "f": jax.nn.relu, "0": None}
    spec = {"w": 2, "v": LORA_FULL, "n": LORA_FREEZE, "f": LORA_FREEZE, "0": None}
    frozen, tunable = init_lora(params, spec, key())
    assert frozen["w"] is params["w"] and frozen["n"] is params["n"]
    assert tunable["v"] is not params["v"] and (tunable["v"] == params["v"]).all()
    assert frozen["f"] is params["f"]
    assert frozen["v"] is tunable["n"] is tunable["f"] is frozen["0"] is tunable["0"] is None


def buffers(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


SHARED = jnp.ones((3, 2))


def test_no_two_leaves_of_tunable_share_a_buffer():
    v = jnp.ones(7)
    params = {"w": jnp.ones((3, 3)), "v": v, "tied": v, "x": jnp.ones((3, 3))}
    spec = {"w": 2, "v": LORA_FULL, "tied": LORA_FULL, "x": 2}
    shared_init = lambda *_: SHARED  # noqa: E731
    _, tunable = init_lora(params, spec, key(), a_init=shared_init)
    leaves = jax.tree.leaves((tunable, v, SHARED))
    assert len(set.union(*map(buffers, leaves))) == len(leaves)
    double = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)
    for _ in range(2):  # JAX does not donate one buffer twice
        tunable = double(tunable)
    assert (v == 1).all() and (SHARED == 1).all() and (tunable["tied"] == 4).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.complex64])
def test_full_leaves_keep_their_dtype_and_stay_uncommitted(dtype):
    v = jnp.ones(7, dtype)
    _, tunable = init_lora({"v": v, "w": jnp.ones((5, 7), dtype)}, {"v": LORA_FULL, "w": 2}, key())
    assert tunable["v"].dtype == dtype and not buffers(tunable["v"]) & buffers(v)
    assert not any(leaf.committed for leaf in jax.tree.leaves(tunable))


@pytest.mark.devices(4)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("memory", [None, "pinned_host"])
def test_full_leaves_keep_their_sharding(kind, memory):
    if memory and memory not in {m.kind for m in jax.devices()[0].addressable_memories()}:
        pytest.skip("this backend has no pinned host memory")
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    on_mesh = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("x"), memory_kind=memory))
    on_device = jax.device_put(jnp.ones(8), jax.devices()[1])
    for v in (on_mesh, on_device):
        _, tunable = init_lora(v, LORA_FULL, key())
        assert tunable.sharding == v.sharding and tunable.committed
        assert not buffers(tunable) & buffers(v)


def test_full_leaves_that_are_not_jax_arrays_keep_their_type():
    array, shape = np.ones(3, np.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    spec = [LORA_FULL, LORA_FULL]
    _, tunable = init_lora([array, shape], spec, key())
    array[:] = 0
    assert type(tunable[0]) is np.ndarray and tunable[0].all() and tunable[1] is shape


def test_full_leaves_are_copies_under_transformations():
    v = jnp.ones((4, 3))
    init = lambda v: init_lora(v, LORA_FULL, key())[1]  # noqa: E731
    for copied in (jax.vmap(init)(v), jax.jit(init)(v), jax.jvp(init, [v], [v])[0]):
        assert (copied == v).all() and not buffers(copied) & buffers(v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any
    extra: Any


def test_any_pytree_is_accepted():
    params = [Layer(jnp.ones((5, 7)), ({"k": jnp.ones((2, 3))}, ()))]
    spec = [Layer(2, ({"k": LORA_FREEZE}, ()))]
    frozen, tunable = init_lora(params, spec, key())
    assert tunable[0].w.a.shape == (5, 2) and tunable[0].extra == ({"k": None}, ())
    assert jax.tree.structure(merge_params(frozen, tunable)) == jax.tree.structure(params)


def test_under_jit_and_eval_shape():
    params = {"w": jnp.ones((5, 7))}

    def init(p):
        return init_lora(p, {"w": 2}, key())

    eager, jitted = init(params)[1]["w"], jax.jit(init)(params)[1]["w"]
    assert jnp.allclose(eager.a, jitted.a) and jitted.rank == 2
    shapes = jax.eval_shape(init, params)[1]["w"]
    assert (shapes.a.shape, shapes.b.shape) == ((5, 2), (2, 7))
    from_shape = init_lora({"w": jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)}, {"w": 2}, key())
    assert from_shape[1]["w"].a.dtype == jnp.float32


@pytest.mark.devices(4)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_are_sharded_like_their_base(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    base = jax.device_put(jnp.ones((4, 6, 8)), NamedSharding(mesh, P("x", None, "y")))
    with jax.set_mesh(mesh):
        _, tunable = init_lora({"w": base}, {"w": 2}, key())
        stacked = LoraSpec(2, shared_axes=[0])
        _, per_layer = init_lora({"w": base}, {"w": stacked}, key())
    assert tunable["w"].a.sharding.spec == P("x", None, None)
    assert tunable["w"].b.sharding.spec == P(None, "y")
    assert per_layer["w"].a.sharding.spec == P("x", None, None)
    assert per_layer["w"].b.sharding.spec == P("x", None, "y")


@pytest.mark.devices(4)
def test_factors_are_sharded_inside_jit_on_explicit_meshes():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        base = jax.device_put(jnp.ones((4, 8)), P("x", "y"))
        _, tunable = jax.jit(lambda p: init_lora(p, {"w": 2}, key()))({"w": base})
    assert tunable["w"].a.sharding.spec == P("x", None)
    assert tunable["w"].b.sharding.spec == P(None, "y")


@pytest.mark.devices(2)
def test_factors_are_on_the_device_of_their_base():
    for device in jax.devices()[:2]:
        base = jax.device_put(jnp.ones((5, 7)), device)
        _, tunable = init_lora({"w": base}, {"w": 2}, key())
        for factor in (tunable["w"].a, tunable["w"].b):
            assert factor.devices() == base.devices() and factor.committed


def test_old_argument_names_warn():
    params, key = {"w": jnp.ones((5, 3))}, jax.random.key(0)
    by_old_name: Any = {"param_tree": params, "spec": {"w": 2}, "rng": key}
    with (
        pytest.warns(DeprecationWarning, match=r"init_lora\(param_tree=…\) is now called `params`"),
        pytest.warns(DeprecationWarning, match=r"init_lora\(rng=…\) is now called `key`"),
    ):
        old = init_lora(**by_old_name)
    new = init_lora(params, {"w": 2}, key)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, old, new))
    del by_old_name["rng"]
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="both `param_tree` and"):
        init_lora(params=params, key=key, **by_old_name)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_wrong_result_of_an_initializer_raises(shape):
    params, spec = {"w": jnp.ones(shape)}, {"w": LoraSpec(2, shared_axes=[0][: len(shape) - 2])}
    wrong_initializers: list[Any] = [
        lambda key, shape, dtype: jnp.ones(3, dtype),
        lambda key, shape, dtype: jnp.ones(shape, jnp.int32),
        lambda key, shape, dtype: None,
    ]
    for wrong in wrong_initializers:
        with pytest.raises(SpecError, match=r"^`w`: the initializer returned .* float32\[5, 2\]"):
            init_lora(params, spec, key(), a_init=wrong)
    of_float32 = lambda key, shape, dtype: jnp.ones(shape)  # noqa: E731
    tunable = init_lora(params, spec, key(), a_init=of_float32, dtype=jnp.bfloat16).tunable
    assert tunable["w"].a.dtype == jnp.bfloat16


def test_invalid_key_or_dtype_raises():
    params = {"w": jnp.ones((5, 7))}
    for wrong in (0, None, "0", jax.random.split(key())):
        with pytest.raises(TypeError, match="init_lora takes one PRNG key"):
            init_lora(params, {"w": 2}, wrong)  # pyright: ignore[reportArgumentType]
    for dtype in (jnp.int32, bool, jnp.float8_e4m3fn):
        with pytest.raises(SpecError, match="cannot hold factors"):
            init_lora(params, {"w": 2}, key(), dtype=dtype)

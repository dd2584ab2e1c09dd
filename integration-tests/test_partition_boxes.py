"""Parameters that Flax has boxed with their partition: the factors get boxes, too."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax
from lorax import testing
from lorax_io import load_adapter, save_adapter

NORMAL = nn.initializers.normal(0.3)
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
MESH_AXES = ("data", "model")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = nn.with_logical_partitioning(NORMAL, ("wide", "wide too"))
        return jnp.tanh(nn.Dense(8, use_bias=False, kernel_init=kernel)(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(NORMAL, (None, "model"))
        bias = nn.with_partitioning(nn.initializers.zeros, ("model",))
        x = nn.Dense(8, kernel_init=kernel, bias_init=bias)(x)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )
        x, _ = layers()(x, None)
        return nn.DenseGeneral((2, 5), kernel_init=nn.with_partitioning(NORMAL, ("model",)))(x)


def forward(params, x) -> Any:
    return Model().apply({"params": params}, x)


@functools.cache
def make_params():
    return Model().init(jax.random.key(0), X)["params"]


@functools.cache
def make_spec():
    spec = lorax.infer_spec(forward, make_params(), X, rank=2)
    spec["Dense_0"]["bias"] = spec["Dense_0"]["bias"].replace_boxed(lorax.LORA_FULL)
    return spec


def make_pair():
    return lorax.init_lora(make_params(), make_spec(), jax.random.key(1))


def test_factors_have_the_partition_of_their_axes():
    frozen, tunable = make_pair()
    specs = nn.get_partition_spec(tunable)
    first, stack, last = specs["Dense_0"], specs["ScanLayer_0"]["Dense_0"], specs["DenseGeneral_0"]
    assert (first["kernel"].a, first["kernel"].b) == (P(None, None), P(None, "model"))
    assert first["bias"] == P("model")
    assert stack["kernel"].a == P("layer", "wide", None)
    assert stack["kernel"].b == P("layer", None, "wide too")
    # Its partition names only the first of three axes.
    assert (last["kernel"].a, last["kernel"].b) == (P("model", None), P(None, None, None))
    assert nn.get_partition_spec(frozen)["Dense_0"]["kernel"] == P(None, "model")
    logical = tunable["ScanLayer_0"]["Dense_0"]["kernel"].a
    assert type(logical) is nn.LogicallyPartitioned


def test_boxed_parameters_are_adapted_and_merged():
    params, spec = make_params(), make_spec()
    testing.check(forward, params, spec, X, tolerance=1e-5)
    frozen, tunable = make_pair()
    tunable = testing.random_factors(tunable, jax.random.key(2))
    merged = lorax.merge_params(frozen, tunable)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    plain = nn.unbox(frozen), nn.unbox(tunable)
    np.testing.assert_allclose(forward(merged, X), lorax.lora(forward)(plain, X), atol=1e-5)
    unmerged = lorax.unmerge(merged, tunable)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), unmerged, frozen)


def test_mismatched_structure_raises():
    frozen, tunable = make_pair()
    tunable = {**tunable, "DenseGeneral_0": {"kernel": None}}
    with pytest.raises(lorax.PairError, match="structure of the parameters"):
        lorax.merge_params(frozen, tunable)


def test_train_state_is_sharded_by_its_boxes():
    mesh = jax.make_mesh((2, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 2)
    rules = (("wide", "data"), ("wide too", "model"), ("layer", None))

    params, spec = make_params(), make_spec()  # cached here, so that `init` does not trace them

    def init():
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1))
        state = TrainState.create(apply_fn=forward, params=tunable, tx=optax.adam(1e-2))
        return frozen, state

    specs = nn.spmd.logical_to_mesh(nn.get_partition_spec(jax.eval_shape(init)), rules)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    frozen, state = jax.jit(init, out_shardings=shardings)()

    @jax.jit
    def step(frozen, state):
        loss = lambda t: jnp.sum((lorax.lora(forward)((frozen, t), X) - 1) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    mu = step(frozen, state).opt_state[0].mu["ScanLayer_0"]["Dense_0"]["kernel"]
    for weight in (state.params["ScanLayer_0"]["Dense_0"]["kernel"], mu):
        assert weight.a.value.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), 3)
        assert weight.b.value.sharding.is_equivalent_to(
            NamedSharding(mesh, P(None, None, "model")), 3
        )


def test_boxed_adapters_roundtrip(tmp_path):
    frozen, tunable = make_pair()
    tunable = testing.random_factors(tunable, jax.random.key(2))
    save_adapter(tmp_path / "a.safetensors", tunable, base=make_params())
    like = load_adapter(tmp_path / "a.safetensors", like=tunable)
    assert jax.tree.structure(like) == jax.tree.structure(tunable)
    jax.tree.map(np.testing.assert_array_equal, like, tunable)
    loaded = load_adapter(tmp_path / "a.safetensors", params=make_params())
    jax.tree.map(
        np.testing.assert_array_equal,
        lorax.merge_params(frozen, loaded),
        lorax.merge_params(frozen, tunable),
    )


def test_factors_of_nnx_variables_have_the_partition_of_their_axes():
    class Net(nnx.Module):
        def __init__(self, rngs):
            kernel = nnx.with_partitioning(NORMAL, ("embed", "mlp"))
            self.boxed = nnx.Linear(6, 8, kernel_init=kernel, rngs=rngs)
            self.plain = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            return self.plain(jnp.tanh(self.boxed(x)))

    mesh = jax.make_mesh((2, 4), ("embed", "mlp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):  # NNX shards such a parameter when it creates it
        graph, params = nnx.split(Net(nnx.Rngs(0)))
    apply = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    spec = lorax.infer_spec(apply, params, X, rank=2)
    testing.check(apply, params, spec, X, tolerance=1e-5)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1))
    specs = nnx.get_partition_spec(tunable)["boxed"]["kernel"]
    assert (specs.a.get_value(), specs.b.get_value()) == (P("embed", None), P(None, "mlp"))
    assert tunable["boxed"]["kernel"].a.get_value().sharding.spec == P("embed", None)
    # A parameter without a partition gives factors without one.
    assert isinstance(tunable["plain"]["kernel"], nnx.Param)
    assert jax.tree.structure(lorax.merge_params(frozen, tunable)) == jax.tree.structure(params)

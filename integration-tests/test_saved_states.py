"""Training states survive a round trip through Flax, Orbax, Equinox, pickle and jax.export."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lorax

X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
NUMPY: Any = np  # untyped, since its scalars are not the types in the signatures
SPEC = {
    "w": lorax.LoraSpec(2, alpha=NUMPY.float32(16), scaling="rslora"),
    "stack": lorax.LoraSpec(NUMPY.int64(3), in_axes=[-2], shared_axes=NUMPY.array([0])),
    "b": lorax.LORA_FULL,
    "norm": lorax.LORA_FREEZE,
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def model(params, x):
    x = x @ params["w"] + params["b"]
    return (
        jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0] * params["norm"]
    )


def make_params():
    draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)  # noqa: E731
    return {"w": draw(7, 11), "stack": draw(2, 11, 11) / 4, "b": jnp.zeros(11), "norm": draw(11)}


@jax.jit
def step(frozen, tunable, state):
    loss = lambda tunable: jnp.sum((lorax.lora(model)((frozen, tunable), X) - 1) ** 2)  # noqa: E731
    updates, state = OPTIMIZER.update(jax.grad(loss)(tunable), state, tunable)
    return optax.apply_updates(tunable, updates), state


def initial_state(seed=0):
    """`(frozen, tunable, state)` before the first step."""
    frozen, tunable = lorax.init_lora(make_params(), SPEC, jax.random.key(seed))
    return frozen, tunable, OPTIMIZER.init(tunable)


@pytest.fixture(scope="module")
def trained():
    frozen, *training = initial_state()
    for _ in range(3):
        training = step(frozen, *training)
    return frozen, tuple(training)


def by_flax(training, _):
    return serialization.from_bytes(initial_state(1)[1:], serialization.to_bytes(training))


def by_flax_train_state(training, _):
    tunable, state = training
    make = lambda tunable: TrainState.create(apply_fn=model, params=tunable, tx=OPTIMIZER)  # noqa: E731
    data = serialization.to_bytes(make(tunable).replace(opt_state=state))
    restored: Any = serialization.from_bytes(make(initial_state(1)[1]), data)
    return restored.params, restored.opt_state


def by_orbax(training, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", training)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, initial_state(1)[1:])
        return checkpointer.restore(folder / "state", shapes)


def by_equinox(training, folder):
    eqx.tree_serialise_leaves(folder / "state.eqx", training)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", initial_state(1)[1:])


def by_pickle(training, _):
    return pickle.loads(pickle.dumps(training))


@pytest.mark.parametrize(
    "save_and_restore",
    [by_flax, by_flax_train_state, by_orbax, by_equinox, by_pickle, lambda t, _: copy.deepcopy(t)],
    ids=["flax", "flax TrainState", "orbax", "equinox", "pickle", "deepcopy"],
)
def test_training_resumes_from_a_checkpoint(trained, save_and_restore, tmp_path):
    frozen, training = trained
    restored = save_and_restore(training, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(training)
    assert_equal(restored, training)
    assert_equal(step(frozen, *restored), step(frozen, *training))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_state_of_another_kind_raises():
    weight = lorax.LoraWeight(np.ones((3, 1)), np.ones((1, 2)), 1)
    with pytest.raises(ValueError, match=r"the state has \['a', 'bias'\]"):
        serialization.from_state_dict({"w": weight}, {"w": {"a": weight.a, "bias": weight.b}})


@pytest.mark.parametrize("first", ["lorax", "flax.serialization"])
def test_flax_serializes_adapters_in_any_import_order(first):
    second = ({"lorax", "flax.serialization"} - {first}).pop()
    program = f"""
import {first}, {second}, numpy as np
weight = lorax.LoraWeight(np.ones((3, 1)), np.ones((1, 2)), 1, alpha=4.0)
data = flax.serialization.to_bytes({{"w": weight}})
assert flax.serialization.from_bytes({{"w": weight}}, data)["w"].alpha == 4.0
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_exported_step_accepts_adapter_and_optimizer_state(trained):
    frozen, training = trained
    for name in ("EmptyState", "ScaleByAdamState", "ScaleByScheduleState"):
        cls = getattr(optax, name)
        jax.export.register_namedtuple_serialization(cls, serialized_name=f"optax.{name}")
    data = jax.export.export(step)(frozen, *training).serialize()
    exported = jax.export.deserialize(bytearray(data))
    assert_equal(exported.call(frozen, *training), step(frozen, *training))
    assert exported.in_tree == jax.tree.structure(((frozen, *training), {}))

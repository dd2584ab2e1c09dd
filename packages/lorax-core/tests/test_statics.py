"""Settings of specs and adapters: normalized, hashable, and equal where their values are."""

import copy
import fractions
import pickle
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraSpec, LoraWeight, SpecError, init_lora, merge_params, spec_from_rules

FACTORS = np.ones((3, 2)), np.ones((2, 5))


@pytest.mark.parametrize(
    "alpha",
    [16, 16.0, np.float32(16), np.int8(16), np.array(16), jnp.float32(16), jnp.bfloat16(16)]
    + [fractions.Fraction(16)],
    ids=lambda alpha: f"{type(alpha).__name__}-{getattr(alpha, 'dtype', '')}",
)
@pytest.mark.parametrize("cls", [LoraSpec, lambda *args: LoraWeight(*FACTORS, *args)])
def test_alpha_becomes_a_python_number(cls, alpha):
    normalized = cls(2, alpha)
    assert type(normalized.alpha) in (int, float) and normalized.alpha == 16


@pytest.mark.parametrize("rank", [2, np.int64(2), np.uint8(2), np.array(2), jnp.int32(2)], ids=repr)
def test_rank_becomes_an_int(rank):
    params = {"w": jnp.ones((3, 5))}
    for spec in (LoraSpec(rank), rank):
        _, tunable = init_lora(params, {"w": spec}, jax.random.key(0))
        assert type(tunable["w"].rank) is int and tunable["w"].rank == 2
    assert spec_from_rules(params, [("w", LoraSpec(rank))]) == {"w": LoraSpec(2)}


@pytest.mark.parametrize("rank", [2.0, np.float32(2), True, np.bool_(True), "2", [2]], ids=repr)
def test_a_rank_that_is_not_an_integer_raises(rank):
    for spec in (LoraSpec(rank), *([] if isinstance(rank, list) else [rank])):
        with pytest.raises(SpecError, match="`w` has"):
            init_lora({"w": jnp.ones((3, 5))}, {"w": spec}, jax.random.key(0))


@pytest.mark.parametrize("axes", [[1], (1,), range(1, 2), np.array([1]), jnp.array([1])], ids=repr)
def test_axes_become_tuples_of_ints(axes):
    spec = LoraSpec(2, in_axes=axes, shared_axes=axes)
    assert spec == LoraSpec(2, in_axes=(1,), shared_axes=(1,)) and hash(spec) == hash(spec)
    weight = LoraWeight(*FACTORS, 2, in_axes=axes, out_axes=axes)
    assert weight.axes == ((), (1,), (1,))
    assert all(type(d) is int for d in (*spec.in_axes, *weight.in_axes))  # pyright: ignore


@pytest.mark.parametrize("axes", [1, "01", np.int64(1)], ids=repr)
@pytest.mark.parametrize("name", ["in_axes", "out_axes", "shared_axes"])
def test_axes_that_are_not_a_sequence_raise(name, axes):
    with pytest.raises(SpecError, match=f"LoraSpec has {name}=.*1.*; axes are a sequence"):
        LoraSpec(2, **{name: axes})


def test_equal_settings_are_one_structure():
    """Settings of other types do not cause another trace, and the trees fit one optimizer."""
    other_types = LoraWeight(*FACTORS, np.int64(2), np.float32(16), in_axes=[0])  # pyright: ignore
    python_types = LoraWeight(*FACTORS, 2, 16.0)
    assert jax.tree.structure(other_types) == jax.tree.structure(python_types)
    traces = []
    jitted = jax.jit(lambda weight: (traces.append(1), weight.a)[1])
    assert (jitted(other_types) == jitted(python_types)).all()
    assert len(traces) == 1


def test_numpy_leaves_can_be_exported():
    spec = LoraSpec(np.int64(2), np.float32(16), in_axes=np.array([0]))  # pyright: ignore
    pair = init_lora({"w": jnp.ones((3, 5))}, {"w": spec}, jax.random.key(0))
    data = jax.export.export(jax.jit(merge_params))(*pair).serialize()
    exported = jax.export.deserialize(bytearray(data))
    assert exported.in_tree == jax.tree.structure((tuple(pair), {}))


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_specs_and_adapters_are_copied_and_pickled(duplicate):
    alpha: Any = np.float32(16)
    spec = LoraSpec(2, alpha, "rslora", [1], [0])
    assert duplicate(spec) == spec
    _, tunable = init_lora({"w": jnp.ones((3, 5))}, {"w": spec}, jax.random.key(0))
    copied = duplicate(tunable)
    assert jax.tree.structure(copied) == jax.tree.structure(tunable)
    jax.tree.map(np.testing.assert_array_equal, copied, tunable)


@pytest.mark.parametrize("content", [None, object(), "x", 3, jax.ShapeDtypeStruct((2,), jnp.int4)])
def test_an_adapter_may_hold_any_leaves(content):
    weight = LoraWeight(*FACTORS, 2)
    assert jax.tree.map(lambda _: content, weight).a is content

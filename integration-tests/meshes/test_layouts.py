"""Adapters on eight devices: data parallel, fully sharded, and tensor parallel."""

import functools

import jax
import numpy as np
import pytest
from sharded import SETTINGS, adapt, make_inputs, names_for_peft, setting, train

import lorax
from lorax import LoraWeight
from lorax_io import load_adapter, load_peft, save_adapter, save_peft

# Sums in float32 have a different order. Relative to the largest entry of each array.
TOLERANCE = 1e-4

each_setting = pytest.mark.parametrize("kind", SETTINGS.values(), ids=SETTINGS)


def pairs(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    return zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)


def assert_close(actual, expected):
    for x, y in pairs(actual, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(y).max())


def assert_equal(actual, expected):
    for x, y in pairs(actual, expected):
        np.testing.assert_array_equal(x, y)


def assert_same_sharding(actual, expected):
    for x, y in pairs(actual, expected):
        assert x.committed and x.sharding.is_equivalent_to(y.sharding, y.ndim)


def partition_of(array):
    """The mesh axes of each axis of an array or an abstract array."""
    spec = array.sharding.spec
    return [*spec, *[None] * (array.ndim - len(spec))]


def assert_sharded_like_base(params, tunable):
    """Each axis of a factor is sharded like the base's axis, and the rank is not sharded."""
    is_leaf = lambda leaf: leaf is None or isinstance(leaf, LoraWeight)  # noqa: E731
    leaves = jax.tree.leaves(tunable, is_leaf=is_leaf)
    for base, leaf in zip(jax.tree.leaves(params), leaves, strict=True):
        entries = partition_of(base)
        if isinstance(leaf, LoraWeight):
            shared, inputs, outputs = (
                [entries[d] for d in axes]
                for axes in (leaf.shared_axes, leaf.in_axes, leaf.out_axes)
            )
            assert partition_of(leaf.a) == [*shared, *inputs, None]
            assert partition_of(leaf.b) == [*shared, None, *outputs]
        elif leaf is not None:
            assert partition_of(leaf) == entries


@functools.cache
def on_one_device(stacked):
    """The initial adapter, the losses, the trained adapter and the merged model."""
    where = setting("one device", explicit=False, stacked=stacked)
    adapted = adapt(where)
    tunable, losses = train(where, adapted)
    merged = lorax.merge_params(adapted.frozen, tunable)
    return jax.device_get((adapted.tunable, losses, tunable, merged))


@each_setting
def test_init_train_merge_and_save_equal_one_device(kind, tmp_path):
    initial, losses, trained, merged = on_one_device(kind["stacked"])
    where = setting(**kind)
    with where.context():
        adapted = adapt(where)
        assert_equal(adapted.tunable, initial)
        assert_sharded_like_base(adapted.params, adapted.tunable)

        tunable, sharded_losses = train(where, adapted)
        np.testing.assert_allclose(sharded_losses, losses, rtol=TOLERANCE)
        assert losses[-1] < 0.9 * losses[0]
        assert_close(tunable, trained)
        assert_same_sharding(tunable, adapted.tunable)

        sharded_merged = lorax.merge_params(adapted.frozen, tunable)
        assert_close(sharded_merged, merged)
        assert_same_sharding(sharded_merged, adapted.params)

        save_adapter(tmp_path / "adapter", tunable, base=adapted.params, hash_base=True)
        loaded = load_adapter(tmp_path / "adapter", params=adapted.params)
        assert_equal(loaded, tunable)
        assert_same_sharding(loaded, adapted.tunable)


EXPLICIT = {name: kind for name, kind in SETTINGS.items() if kind["explicit"]}


@pytest.mark.parametrize("kind", EXPLICIT.values(), ids=EXPLICIT)
def test_explicit_axes_are_in_the_types_of_factors_under_jit(kind):
    where = setting(**kind)
    with where.context():
        params, spec, _ = make_inputs(where)
        init = jax.jit(lambda params: lorax.init_lora(params, spec, jax.random.key(0))[1])
        assert_sharded_like_base(params, jax.eval_shape(init, params))


FULLY = {name: kind for name, kind in SETTINGS.items() if name.startswith("fully sharded and")}


@pytest.mark.parametrize("kind", FULLY.values(), ids=FULLY)
def test_peft_folder_is_loaded_with_the_sharding_of_its_base(kind, tmp_path):
    where = setting(**kind)
    names = names_for_peft(where.stacked)
    with where.context():
        adapted = adapt(where)
        save_peft(tmp_path / "folder", adapted.tunable, names)
        _, loaded = load_peft(tmp_path / "folder", adapted.params, names)
        assert_equal(loaded, adapted.tunable)
        assert_same_sharding(loaded, adapted.tunable)

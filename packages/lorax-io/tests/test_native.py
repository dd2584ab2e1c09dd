import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import AdapterFileError, load_adapter, read_metadata, save_adapter


def make_tunable(alpha=None, seed=0):
    params = {
        "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)},
        "out": [jnp.ones((3, 7), jnp.bfloat16), jnp.float32(2.0)],
    }
    spec = {
        "dense": {"kernel": lorax.LoraSpec(2, alpha=alpha), "bias": lorax.LORA_FREEZE},
        "out": [lorax.LORA_FULL, lorax.LORA_FULL],
    }
    _, tunable = lorax.init_lora(params, spec, jax.random.PRNGKey(seed))
    return tunable


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_round_trip_keeps_values_dtypes_and_structure(tmp_path):
    tunable = make_tunable(alpha=8)
    save_adapter(tmp_path / "a.safetensors", tunable)
    assert_same(load_adapter(tmp_path / "a.safetensors", make_tunable(alpha=8, seed=1)), tunable)


def test_like_may_be_shapes_alone(tmp_path):
    tunable = make_tunable()
    save_adapter(tmp_path / "a", tunable)
    assert_same(load_adapter(tmp_path / "a", jax.eval_shape(make_tunable)), tunable)


def test_entries_are_named_by_path(tmp_path):
    save_adapter(tmp_path / "a", make_tunable())
    assert set(safetensors.numpy.load_file(tmp_path / "a")) == {
        "dense/kernel/a",
        "dense/kernel/b",
        "out/0",
        "out/1",
    }


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0, dtype=np.float32).reshape(2, 3).T, np.arange(8.0, dtype=np.float32)[::2]],
    ids=["transposed", "strided"],
)
def test_values_survive_any_memory_order(tmp_path, array):
    save_adapter(tmp_path / "a", {"w": array})
    np.testing.assert_array_equal(load_adapter(tmp_path / "a", {"w": array})["w"], array)


def test_metadata_comes_back(tmp_path):
    save_adapter(tmp_path / "a", make_tunable(), metadata={"base": "tiny"})
    assert read_metadata(tmp_path / "a") == {"base": "tiny"}


def test_reserved_metadata_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="lorax.format"):
        save_adapter(tmp_path / "a", make_tunable(), metadata={"lorax.format": "9"})


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", {"w": jnp.ones(3)})

    def full_disk(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(tmp_path / "a", {"w": jnp.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    np.testing.assert_array_equal(load_adapter(tmp_path / "a", {"w": jnp.zeros(3)})["w"], 1)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.ones(3), "v": jnp.ones(3)}, r"no entry 'v'"),
        ({"v": jnp.ones(3)}, r"no entry 'v'"),
        ({"w": jnp.ones(4)}, r"'w' is \(\(3,\), 'float32'\).*\(4,\)"),
        ({"w": jnp.ones(3, jnp.float16)}, r"'w' is .*float32.*float16"),
    ],
    ids=["missing", "renamed", "shape", "dtype"],
)
def test_difference_names_the_entry(tmp_path, like, message):
    save_adapter(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(tmp_path / "a", like)


def test_entry_without_a_place_is_refused(tmp_path):
    save_adapter(tmp_path / "a", {"w": jnp.ones(3), "x": jnp.ones(3)})
    with pytest.raises(AdapterFileError, match="no place for the entry 'x'"):
        load_adapter(tmp_path / "a", {"w": jnp.ones(3)})


def test_other_alpha_is_refused(tmp_path):
    save_adapter(tmp_path / "a", make_tunable(alpha=8))
    with pytest.raises(AdapterFileError, match="dense/kernel"):
        load_adapter(tmp_path / "a", make_tunable(alpha=4))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": None}, "no array"),
        ({"w": {"v": jnp.ones(1)}, "w/v": jnp.ones(1)}, "'w/v'"),
        ({"w": jnp.ones(1, jnp.float8_e4m3fn)}, "'w' is float8_e4m3fn"),
        ({"w": "text"}, "'w' is str"),
    ],
    ids=["empty", "same-name", "dtype", "no-array"],
)
def test_what_cannot_be_saved_is_said(tmp_path, tree, message):
    with pytest.raises(AdapterFileError, match=message):
        save_adapter(tmp_path / "a", tree)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a safetensors file, whatever its name")
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        load_adapter(tmp_path / "text", {"w": jnp.ones(1)})
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path / "plain")
    with pytest.raises(AdapterFileError, match="not a native Lorax adapter"):
        read_metadata(tmp_path / "plain")

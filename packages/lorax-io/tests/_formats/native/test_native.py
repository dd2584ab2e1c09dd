"""Native files: round trips and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from comparing import assert_same

import lorax
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterWarning,
    load_adapter,
    read_metadata,
    save_adapter,
)


def make_params():
    return {
        "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)},
        "out": [jnp.ones((3, 7), jnp.bfloat16), jnp.float32(2.0)],
        "stack": jnp.ones((2, 3, 5, 7)),
    }


def make_tunable(alpha=None, seed=0):
    spec = {
        "dense": {"kernel": lorax.LoraSpec(2, alpha=alpha), "bias": lorax.LORA_FREEZE},
        "out": [lorax.LORA_FULL, lorax.LORA_FULL],
        "stack": lorax.LoraSpec(2, 3.5, "rslora", in_axes=(1, 3), shared_axes=(0,)),
    }
    return lorax.init_lora(make_params(), spec, jax.random.key(seed))[1]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("fit", ["params", "shapes", "like", "like shapes"])
def test_loaded_equals_saved(file, fit):
    tunable = make_tunable(alpha=8)
    save_adapter(file, tunable, base=make_params())
    like = make_tunable(alpha=8, seed=1)
    asked: dict[str, Any] = {
        "params": {"params": make_params()},
        "shapes": {"params": jax.eval_shape(make_params)},
        "like": {"like": like},
        "like shapes": {"like": jax.eval_shape(lambda: like)},
    }[fit]
    assert_same(load_adapter(file, **asked), tunable)


def test_one_of_params_and_like_is_needed(file):
    save_adapter(file, make_tunable())
    both: dict[str, Any] = {"params": make_params(), "like": make_tunable()}
    for asked in ({}, both):
        with pytest.raises(TypeError, match="`params` or `like`"):
            load_adapter(file, **asked)


DTYPES = (
    "bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64"
    " float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
)


@pytest.mark.parametrize("dtype", DTYPES.split())
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 3)], ids=str)
def test_every_dtype_loads_as_saved(file, dtype, shape):
    numbers = np.random.default_rng(0).integers(
        1, 3, shape
    )  # one of the dtypes does not have a zero
    tree = {"w": jnp.asarray(numbers == 1 if dtype == "bool" else numbers).astype(dtype)}
    save_adapter(file, tree)
    assert_same(load_adapter(file, like=tree), tree)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float4_e2m1fn", "float8_e3m4"])
def test_unsupported_dtypes_raise(file, dtype):
    with pytest.raises(AdapterError, match=f"`w` is {dtype}, which a safetensors file cannot"):
        save_adapter(file, {"w": jnp.zeros(3, dtype)})
    assert not file.exists()


def test_double_precision_is_preserved(file):
    save_adapter(file, {"w": np.arange(3.0)})
    with pytest.raises(AdapterMismatchError, match="`w` in float64.*jax_enable_x64"):
        load_adapter(file, params={"w": np.zeros(3)})
    with jax.enable_x64(True):
        assert load_adapter(file, params={"w": np.zeros(3)})["w"].dtype == np.float64


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0, dtype=np.float32).reshape(2, 3).T, np.arange(8.0, dtype=np.float32)[::2]],
    ids=["transposed", "strided"],
)
def test_values_survive_any_memory_order(file, array):
    save_adapter(file, {"w": array})
    np.testing.assert_array_equal(load_adapter(file, like={"w": array})["w"], array)


def test_empty_adapter_round_trips(file):
    save_adapter(file, {"w": None})
    assert load_adapter(file, params={"w": jnp.ones(3)}) == {"w": None}


def test_tensors_are_named_by_path(file):
    save_adapter(file, make_tunable())
    names = {"dense/kernel/a", "dense/kernel/b", "out/0", "out/1", "stack/a", "stack/b"}
    assert set(safetensors.numpy.load_file(file)) == names


def test_metadata_round_trips(file):
    save_adapter(file, make_tunable(), metadata={"base": "tiny"})
    assert read_metadata(file) == {"base": "tiny"}
    with pytest.raises(AdapterError, match=r"lorax\.format"):
        save_adapter(file, make_tunable(), metadata={"lorax.format": "9"})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": {"v": jnp.ones(1)}, "w/v": jnp.ones(1)}, "`w/v`"),
        ({"w": jnp.array([1.0, np.nan])}, "`w` holds NaN"),
        ({"w": jnp.array([1.0, -np.inf], jnp.bfloat16)}, "`w` holds NaN or infinity"),
        ({"w": "text"}, "`w` is str"),
        ({"w": jax.random.key(0)}, "`w` holds PRNG keys"),
        ({"__metadata__": jnp.ones(1)}, "__metadata__"),
        (
            {"w": lorax.init_lora(jnp.ones((5, 3)), 2, jax.random.key(0))[1], "w/a": jnp.ones(1)},
            "two arrays are both called `w/a`",
        ),
    ],
    ids=["same path", "nan", "infinity", "not an array", "keys", "reserved", "same tensor"],
)
def test_unsavable_trees_raise(file, tree, message):
    with pytest.raises(AdapterError, match=message):
        save_adapter(file, tree)
    assert not list(file.parent.iterdir())


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.ones(3), "v": jnp.ones(3)}, "lacks `v`, which is in `like`"),
        ({"v": jnp.ones(3)}, "has `w`, which is not in `like`"),
        ({"w": jnp.ones(4)}, r"`w` of shape \(3,\), but \(4,\) would fit"),
        ({"w": jnp.ones(3, jnp.float16)}, "`w` in float32, but `like` has float16"),
        ({"w": lorax.LoraWeight(jnp.ones((5, 2)), jnp.ones((2, 3)), rank=2)}, "'kind': 'full'"),
    ],
    ids=["missing", "renamed", "shape", "dtype", "kind"],
)
def test_mismatched_like_raises(file, like, message):
    save_adapter(file, {"w": jnp.ones(3)})
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(file, like=like)


def test_mismatched_alpha_raises(file):
    save_adapter(file, make_tunable(alpha=8))
    with pytest.raises(AdapterMismatchError, match="`dense/kernel`.*'alpha': 8.*'alpha': 4"):
        load_adapter(file, like=make_tunable(alpha=4))


def changed(params, **dense):
    return {**params, "dense": {**params["dense"], **dense}}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (changed(make_params(), kernel=jnp.ones((5, 4))), r"`dense/kernel/b`.*\(2, 4\) would fit"),
        (changed(make_params(), kernel=None), "adapts `dense/kernel`, which is NoneType"),
        ({"dense": make_params()["dense"]}, "`stack`, which is not in the parameters"),
        (changed(make_params(), bias=jnp.zeros(5)), "another base.*other shapes"),
        (changed(make_params(), kernel=jnp.zeros((5, 3))), "another base.*other content"),
    ],
    ids=["shape", "none", "path", "elsewhere", "numbers"],
)
def test_mismatched_base_raises(file, params, message):
    save_adapter(file, make_tunable(), base=make_params(), hash_base=True)
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(file, params=params)


def test_same_base_in_another_dtype_warns(file):
    save_adapter(file, make_tunable(), base=make_params())
    params = changed(make_params(), kernel=jnp.ones((5, 3), jnp.bfloat16))
    with pytest.warns(AdapterWarning, match="other dtypes"):
        assert_same(load_adapter(file, params=params), make_tunable())


def test_frozen_tree_is_accepted_as_base(file):
    params = make_params()
    spec = jax.tree.map(lambda leaf: lorax.LORA_FULL, params)
    spec["stack"] = 2
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    save_adapter(file, tunable, base=frozen, hash_base=True)
    assert_same(load_adapter(file, params=params), tunable)


def test_base_with_another_structure_raises_on_save(file):
    with pytest.raises(
        AdapterMismatchError, match="`dense/kernel`, which is not in the parameters"
    ):
        save_adapter(file, make_tunable(), base={"stack": jnp.ones((2, 3, 5, 7))})


def test_other_files_raise(file):
    file.write_text("not a safetensors file, whatever its name")
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        load_adapter(file, params={"w": jnp.ones(1)})
    safetensors.numpy.save_file({"w": np.ones(1)}, file)
    with pytest.raises(AdapterFileError, match="not a native adapter"):
        read_metadata(file)

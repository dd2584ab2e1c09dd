"""Frozen trees on disk: loaded bit for bit, or an error that names the tensor."""

import dataclasses
import json
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_same

from lorax import (
    FP8,
    LORA_FULL,
    MXFP4,
    NF4,
    DoraSpec,
    Int4,
    Int8,
    LoraSpec,
    dequantize,
    init_lora,
    lora,
    quantize,
)
from lorax.bases import FORMATS, NVFP4, Affine, LLMInt8
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterWarning,
    Linear,
    Tensor,
    load_adapter,
    load_frozen,
    load_pair,
    load_peft,
    read_metadata,
    save_adapter,
    save_frozen,
    save_merged,
    save_peft,
)
from lorax_io._disk.tensors import TensorFile

CODECS = {
    "int8": Int8(), "int8-asymmetric": Int8(64, symmetric=False), "int4": Int4(),
    "int4-asymmetric": Int4(symmetric=False), "nf4": NF4(), "nf4-single": NF4(double=False),
    "e5m2": FP8("e5m2"), "squares": FP8(block=2, square=True), "mxfp4": MXFP4(), "nvfp4": NVFP4(),
    "affine": Affine(), "groups": Affine(group=2), "llm-int8": LLMInt8(),
}  # fmt: skip
SHAPES = {"stack": (3, 64, 6), "odd": (5, 64, 7), "table": (7, 64)}


def draw(shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def test_every_format_has_a_row():
    assert {format.name for format in CODECS.values()} == set(FORMATS)


@pytest.mark.parametrize("name", CODECS)
def test_loaded_equals_saved(tmp_path, name):
    shapes = SHAPES if name == "nf4" else {"w": (4, 6)} if name == "squares" else {"w": (128, 7)}
    params = {key: draw(shape) for key, shape in shapes.items()}
    formats = {key: dataclasses.replace(CODECS[name], along=(int(key != "w"),)) for key in params}
    frozen = quantize(params, formats)
    save_frozen(tmp_path / "f", frozen)
    assert_same(load_frozen(tmp_path / "f", params=params), frozen)
    assert_same(load_frozen(tmp_path / "f", like=frozen), frozen)
    assert_same(load_frozen(tmp_path / "f", like=jax.eval_shape(lambda: frozen)), frozen)


PARAMS: dict[str, Any] = {
    "w": draw((128, 6)),
    "scaled": draw((64, 5)),
    "norm": jnp.ones(6),
    "mask": jnp.asarray([-np.inf, 0.0]),
    "on": jnp.asarray([True, False]),
    "head": jnp.ones((6, 4)),
    "absent": None,
}


def make_pair() -> tuple[dict[str, Any], dict[str, Any]]:
    formats = {"w": NF4(), "scaled": Int4(), **dict.fromkeys(["norm", "mask", "on", "head"])}
    spec = {"w": LoraSpec(2), "scaled": DoraSpec(LoraSpec(2)), "head": LORA_FULL}
    some = {name: leaf for name, leaf in PARAMS.items() if leaf is not None}
    zeros = {name: 0 for name in some}
    pair = init_lora(quantize(some, formats), zeros | spec, jax.random.key(0))
    return ({**pair.frozen, "absent": None}, {**pair.tunable, "absent": None})


FROZEN, TUNABLE = make_pair()


@pytest.fixture
def file(tmp_path):
    save_frozen(tmp_path / "f", FROZEN, metadata={"model": "mine"})
    return tmp_path / "f"


def test_frozen_tree_of_every_leaf_type_roundtrips(file):
    assert FROZEN["head"] is None and FROZEN["scaled"].factors.keys() == {"square"}
    assert_same(load_frozen(file, params=PARAMS), FROZEN)
    assert_same(load_frozen(file, like=FROZEN), FROZEN)
    assert read_metadata(file) == {"model": "mine"}


def test_frozen_factors_are_recomputed_after_quantization(tmp_path):
    params, spec = {"w": jnp.ones((64, 6)) / 3}, {"w": DoraSpec(LoraSpec(2))}
    frozen = init_lora(params, spec, jax.random.key(0)).frozen
    save_frozen(tmp_path / "f", frozen)
    loaded = load_frozen(tmp_path / "f", params=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(frozen)
    coded = quantize(loaded, {"w": MXFP4()})["w"]
    expected = np.sum(np.asarray(coded.base.array()) ** 2, 0)
    np.testing.assert_allclose(coded.factors["square"], expected, rtol=1e-6)


def test_4_bit_codes_are_packed(file):
    with TensorFile(file) as saved:
        assert saved.entries["w/codes"].shape == (2, 32, 6)
        low_high = saved.view("w/codes")[1, 3, 5]
    codes = np.asarray(FROZEN["w"].arrays["codes"]).astype(int)
    assert low_high == codes[1, 6, 5] + 16 * codes[1, 7, 5]


def test_equal_trees_give_identical_files(file, tmp_path):
    save_frozen(tmp_path / "resaved", load_frozen(file, params=PARAMS), metadata={"model": "mine"})
    assert (tmp_path / "resaved").read_bytes() == file.read_bytes()


def test_parameters_in_another_dtype_warn(file):
    with pytest.warns(AdapterWarning, match="`scaled` in bfloat16, not float32"):
        load_frozen(file, params={**PARAMS, "scaled": jnp.ones((64, 5))})


def test_quantized_base_is_accepted_in_place_of_parameters(tmp_path):
    """Adapter files accept a quantized base in place of parameters."""
    file = tmp_path / "a"
    save_adapter(file, TUNABLE, base=FROZEN, hash_base=True)
    assert_same(load_adapter(file, params=FROZEN | {"head": PARAMS["head"]}), TUNABLE)
    pair = load_pair(file, FROZEN | {"head": PARAMS["head"]})
    assert_same(pair.frozen["scaled"], FROZEN["scaled"])
    save_peft(tmp_path / "peft", {"w": TUNABLE["w"]}, {"w": Linear("w")})
    loaded = load_peft(tmp_path / "peft", {"w": FROZEN["w"]}, {"w": Linear("w")})
    assert_same(tuple(loaded), ({"w": FROZEN["w"]}, {"w": TUNABLE["w"]}))
    other = quantize({"w": PARAMS["w"] * 2}, {"w": NF4()})
    with pytest.raises(AdapterMismatchError, match="another base"):
        load_adapter(file, params=FROZEN | other | {"head": PARAMS["head"]})
    some = lambda tree: {name: tree[name] for name in ("w", "norm")}  # noqa: E731
    x = jnp.ones((2, 128), jnp.bfloat16)
    adapted = lora(lambda p, x: x @ p["w"])
    out = [adapted(tuple(map(some, trees)), x) for trees in ((FROZEN, TUNABLE), pair)]
    np.testing.assert_array_equal(*out)
    names = {"w": Linear("w"), "norm": Tensor("norm", parameter="weight")}
    save_merged(tmp_path / "m", some(FROZEN), some(TUNABLE), names)
    with TensorFile(tmp_path / "m" / "model.safetensors") as merged_file:
        expected = np.asarray(dequantize(FROZEN["w"])).T
        np.testing.assert_array_equal(merged_file.view("w.weight"), expected)


# Damage


def damage(file, *, header=None, tensors=None):
    """Rewrites a file with a changed header and changed bytes of tensors."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    for name, (offset, value) in (tensors or {}).items():
        begin = head[name]["data_offsets"][0] + offset
        body[begin : begin + len(value)] = value
    if header is not None:
        header(head)
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))


def bases(change):
    """A change to the bases in the header."""

    def header(head):
        entries = json.loads(head["__metadata__"]["lorax.bases"])
        change(entries)
        head["__metadata__"]["lorax.bases"] = json.dumps(entries)

    return header


def packing(**change):
    def header(head):
        entries = json.loads(head["__metadata__"]["lorax.packed"])
        entries["w/codes"] |= change
        head["__metadata__"]["lorax.packed"] = json.dumps(entries)

    return header


def set_quantized(**change):
    return bases(lambda entries: entries["w"]["quantized"].update(change))


def adapter(settings):
    return bases(lambda head: head["scaled"].update(adapter=settings))


def unpacked(head):
    del head["__metadata__"]["lorax.packed"]


NAN = np.float32(np.nan).tobytes()
DAMAGE: dict[str, tuple[Any, str]] = {
    "format": (set_quantized(format="of tomorrow"), "does not fit the quantized weight `w`"),
    "setting": (set_quantized(block="wide"), "does not fit the quantized weight `w`: .*'wide'"),
    "blocks": (set_quantized(blocks=[[0, 32]]), "does not fit the quantized weight `w`: codes"),
    "no blocks": (set_quantized(blocks=[[0]]), "does not fit the quantized weight `w`"),
    "blocks of null": (set_quantized(blocks=[[0, 0]]), "does not fit the quantized weight `w`"),
    "axis": (set_quantized(along=[7]), "does not fit the quantized weight `w`"),
    "dtype": (set_quantized(dtype="int8"), "does not fit the quantized weight `w`: .*'int8'"),
    "another format": (set_quantized(format="int8"), "does not fit the quantized weight `w`"),
    "arrays": (bases(lambda f: f["w"].update(arrays=["codes", "scales"])), "arrays .*'outer'"),
    "array twice": (bases(lambda f: f["w"].update(factors=["codes"])), "both called `w/codes`"),
    "no arrays": (bases(lambda f: f["w"].update(arrays="codes")), "no list of the arrays of `w`"),
    "missing": (bases(lambda f: f["w"]["arrays"].append("zeros")), "lacks the tensor `w/zeros`"),
    "extra": (bases(lambda f: f.pop("scaled")), "has a tensor `scaled/codes` that its header"),
    "not an object": (bases(lambda f: f.update(w=[])), "does not say how `w` is stored"),
    "adapter": (adapter({"kind": "nothing"}), "the adapter of the frozen factors of `scaled`"),
    "no adapter": (adapter([]), "the adapter of the frozen factors of `scaled`"),
    "half an adapter": (adapter({"kind": "dora"}), "the adapter of the frozen factors of `scaled`"),
    "packed shape": (packing(shape=[2, 64, 7]), "`w/codes` of uint8 .* is uint8"),
    "packed axis": (packing(axis=5), "does not say how `w/codes` is packed"),
    "packed type": (packing(dtype="int2"), "does not say how `w/codes` is packed"),
    "packed as float": (packing(dtype="int4"), "does not have codes in int4"),
    "not packed": (unpacked, "is not JSON that can be read"),
    "later": (lambda h: h["__metadata__"].update({"lorax.frozen_format": "9"}), "Update it"),
    "foreign": (lambda h: h.pop("__metadata__"), "not a frozen tree of `save_frozen`"),
    "NaN of a scale": ({"scaled/scales": (4, NAN)}, "`scaled/scales` holds NaN"),
    "infinite scale": ({"w/outer": (0, np.float32(np.inf).tobytes())}, "`w/outer` holds NaN, inf"),
    "NaN of a base": ({"norm": (8, NAN)}, "`norm` holds NaN"),
    "NaN of a factor": ({"scaled/square": (0, NAN)}, "`scaled/square` holds NaN"),
    "bool": ({"on": (1, b"\x07")}, "`on` has a boolean that is neither true nor false"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_raises(file, case):
    change, message = DAMAGE[case]
    damage(file, **({"tensors": change} if isinstance(change, dict) else {"header": change}))
    with pytest.raises(AdapterError, match=message) as caught:
        load_frozen(file, params=PARAMS)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_truncated_frozen_file_raises(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(AdapterFileError, match="is not a safetensors file"):
        load_frozen(file, params=PARAMS)


def test_nan_in_power_scales_raises(tmp_path):
    frozen = quantize({"w": draw((64, 2))}, {"w": MXFP4()})
    save_frozen(tmp_path / "f", frozen)
    damage(tmp_path / "f", tensors={"w/scales": (1, b"\xff")})
    with pytest.raises(AdapterError, match="`w/scales` holds NaN"):
        load_frozen(tmp_path / "f", like=frozen)


OTHERS: dict[str, tuple[Any, str]] = {
    "lacking": ({k: v for k, v in PARAMS.items() if k != "norm"}, "has `norm`, which the tree"),
    "more": ({**PARAMS, "nrom": jnp.ones(3)}, "lacks `nrom`.*Did you mean `norm`"),
    "shape": ({**PARAMS, "w": jnp.ones((6, 128))}, r"has `w` of shape \(128, 6\).*\(6, 128\)"),
    "none": ({**PARAMS, "w": None}, "`w` of shape .*; the parameters have NoneType"),
    "adapters": (TUNABLE, "have an adapter at"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_mismatched_parameters_raise(file, case):
    params, message = OTHERS[case]
    with pytest.raises(AdapterError, match=message):
        load_frozen(file, params=params)


def test_like_with_another_format_raises(file):
    like = FROZEN | quantize({"w": PARAMS["w"]}, {"w": NF4(32)})
    with pytest.raises(AdapterMismatchError, match="has `w`.*'block': 64.*but `like`"):
        load_frozen(file, like=like)


def test_one_of_params_and_like_is_needed(file):
    both: dict[str, Any] = {"params": PARAMS, "like": FROZEN}
    none: dict[str, Any] = {}
    for given in (none, both):
        with pytest.raises(TypeError, match="`params` or `like`"):
            load_frozen(file, **given)


def test_adapter_and_frozen_tree_loaders_reject_each_other(file, tmp_path):
    with pytest.raises(AdapterFileError, match="is a frozen tree, not an adapter; `load_frozen`"):
        load_adapter(file, params=PARAMS)
    save_adapter(tmp_path / "a", TUNABLE)
    with pytest.raises(AdapterFileError, match="`load_adapter` adapters"):
        load_frozen(tmp_path / "a", params=PARAMS)


BAD: dict[str, tuple[Any, str]] = {
    "NaN": ({"w": jnp.asarray([np.nan])}, "`w` holds NaN"),
    "an adapter": (TUNABLE, "have an adapter"),
    "not an array": ({"w": "text"}, "`w` is str, not an array"),
    "keys": ({"w": jax.random.key(0)}, "PRNG keys"),
    "complex": ({"w": np.ones(2, np.complex128)}, "complex128"),
    "duplicate names": ({"w": FROZEN["w"], "w/codes": jnp.ones(2)}, "both called `w/codes`"),
    "metadata": ({"__metadata__": jnp.ones(2)}, "cannot be called `__metadata__`"),
}


@pytest.mark.parametrize("case", BAD)
def test_failed_save_leaves_the_old_file(file, case):
    before = file.read_bytes()
    tree, message = BAD[case]
    with pytest.raises(AdapterError, match=message):
        save_frozen(file, tree)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_reserved_metadata_keys_raise(tmp_path):
    with pytest.raises(AdapterError, match="may not begin with 'lorax.'"):
        save_frozen(tmp_path / "f", FROZEN, metadata={"lorax.bases": "{}"})


def test_memory_is_limited_by_the_largest_tensor(tmp_path):
    params = {f"w{k}": jnp.full((2048, 1024), 1.0 + k, jnp.bfloat16) for k in range(4)}
    frozen = quantize(params, dict.fromkeys(params, NF4()))
    largest = 2048 * 1024 // 2

    def peak(function):
        tracemalloc.start()
        function()
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    for function in (
        lambda: save_frozen(tmp_path / "f", frozen),
        lambda: load_frozen(tmp_path / "f", like=frozen),
    ):
        function()  # excludes imports and traces
        assert (highest := peak(function)) <= 1.1 * largest, highest

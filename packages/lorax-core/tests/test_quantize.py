"""`quantize`: the weights and axes that it quantizes, round trips, adapters, and errors."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import (
    FP8,
    LORA_FULL,
    MXFP4,
    NF4,
    ArgumentError,
    DeloraSpec,
    DoraSpec,
    IA3Spec,
    Int4,
    Int8,
    LohaSpec,
    LoraSpec,
    QuantizedWeight,
    SpecError,
    TokensSpec,
    UnquantizedWarning,
    VeraSpec,
    count_params,
    dequantize,
    explain,
    init_lora,
    lora,
    merge_params,
    quantize,
)
from lorax.bases import NVFP4, Affine, LLMInt8, quantized_from_settings
from lorax.testing import random_factors

FEW = [Int8(), Int4(32, symmetric=False), NF4(), MXFP4()]
MORE = [
    Int8(32), Int8(symmetric=False), Int4(), NF4(128, double=False), FP8(), FP8("e5m2"),
    FP8(block=64, square=True), NVFP4(), LLMInt8(), Affine(), Affine(group=2),
]  # fmt: skip
FORMATS = [*FEW, *(pytest.param(format, marks=pytest.mark.full_product) for format in MORE)]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 8


def model(params, ids):
    """A tied table, a norm, a projection stored [out, in], and a stack of layers."""
    x = params["table"][ids] + params["positions"][: ids.shape[0]]
    x = x * params["norm"][None]
    x = x @ params["up"].T + params["bias"][None]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["up"] @ params["table"].T


PARAMS = {
    "table": normal(0, 50, 64),
    "positions": normal(1, 9, 64),
    "norm": jnp.ones(64),
    "up": normal(2, 128, 64),
    "bias": jnp.zeros(128),
    "layers": normal(3, 3, 128, 128),
}
IDS = jnp.arange(5)
KEY = jax.random.key(0)


def quantized(tree):
    return {name for name, leaf in tree.items() if isinstance(leaf, QuantizedWeight)}


def test_quantizes_only_weights_of_products():
    frozen = quantize(PARAMS, "nf4", fn=model, args=(IDS,))
    assert quantized(frozen) == {"up", "layers"}
    assert all(frozen[name] is PARAMS[name] for name in PARAMS.keys() - quantized(frozen))


def test_blocks_run_along_the_inputs():
    frozen = quantize(PARAMS, NF4(64), fn=model, args=(IDS,))
    assert frozen["up"].arrays["codes"].shape == (128, 1, 64)  # its first use sums over 64
    assert frozen["up"].arrays["scales"].shape == (128, 1)
    assert frozen["layers"].arrays["codes"].shape == (3, 2, 64, 128)
    assert frozen["layers"].arrays["outer"].shape == (3, 128)


def test_tables_option_quantizes_tables_along_their_rows():
    frozen = quantize(PARAMS, NF4(64), fn=model, args=(IDS,), tables=True)
    assert quantized(frozen) == {"up", "layers", "table"}
    assert frozen["table"].arrays["codes"].shape == (50, 1, 64)


def test_where_selects_paths():
    frozen = quantize(PARAMS, "int8", fn=model, args=(IDS,), where="lay*")
    assert quantized(frozen) == {"layers"}


def test_takes_keywords_and_shapes():
    shape = jax.ShapeDtypeStruct((5,), jnp.int32)
    frozen = quantize(PARAMS, "int8", fn=lambda p, *, ids: model(p, ids), kwargs={"ids": shape})
    assert quantized(frozen) == {"up", "layers"}


def test_a_tree_of_formats():
    formats = dict.fromkeys(PARAMS) | {"up": "int8", "table": NF4(64, along=(1,))}
    frozen = quantize(PARAMS, formats)
    assert quantized(frozen) == {"up", "table"}
    assert frozen["up"].arrays["scales"].shape == (64,)  # the last axis but one is the input
    with_roles = quantize(PARAMS, formats, fn=model, args=(IDS,))
    assert with_roles["up"].arrays["scales"].shape == (128,)


def test_one_array_at_two_paths_is_quantized_once():
    shared = normal(4, 64, 64)
    frozen = quantize(
        {"a": shared, "b": shared},
        "int8",
        fn=lambda p, x: x @ p["a"] @ p["b"],
        args=(normal(5, 2, 64),),
    )
    assert frozen["a"] is frozen["b"]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_and_bits(format):
    weight = normal(6, 256, 128)
    coded = quantize({"w": weight}, {"w": format})["w"]
    error = float(jnp.linalg.norm(coded.array() - weight) / jnp.linalg.norm(weight))
    limits = {
        "int8": (0.008, 9.0), "int4": (0.1, 5.2), "nf4": (0.1, 4.5), "mxfp4": (0.13, 4.25),
        "nvfp4": (0.1, 4.7), "llm_int8": (0.008, 8.2), "affine": (0.09, 6.0),
    }  # fmt: skip
    error_most, bits_most = limits.get(format.name, (0.06, 8.2))
    assert error < error_most and coded.bits <= bits_most, (error, coded.bits)
    # XLA stores as many bits for each entry as `bits` says.
    compiled: Any = jax.jit(lambda arrays: arrays).lower(coded.arrays).compile()
    kept = compiled.memory_analysis().argument_size_in_bytes
    assert coded.nbytes <= kept <= coded.nbytes + 64 * len(coded.arrays)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decoded_weight_quantizes_to_itself(format):
    """Quantizing the decoded weight again gives the same weight, up to the rounding of scales."""
    once = quantize({"w": normal(7, 128, 64)}, {"w": format})["w"].array()
    again = quantize({"w": once}, {"w": format})["w"].array()
    np.testing.assert_allclose(again, once, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_blocks_of_zeros_stay_zero(format):
    weight = normal(8, 128, 64).at[:64].set(0)
    coded = quantize({"w": weight}, {"w": format})["w"].array()
    assert not coded[:64].any() and jnp.isfinite(coded).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_settings_round_trip(format):
    coded = quantize({"w": normal(9, 128, 64)}, {"w": format})["w"]
    again = quantized_from_settings(json.loads(json.dumps(coded.settings())), coded.arrays)
    assert jax.tree.structure(again) == jax.tree.structure(coded)


def test_invalid_settings_or_arrays_raise():
    coded = quantize({"w": normal(10, 128, 64)}, {"w": NF4(64)})["w"]
    settings = coded.settings()
    for change in (
        {"block": 7}, {"block": "64"}, {"more": 1}, {"blocks": [[0, 63]]}, {"blocks": [[9, 64]]},
        {"along": [4]}, {"along": 0}, {"dtype": "int8"}, {"dtype": "float33"}, {"format": "nf5"},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError, KeyError)):
            quantized_from_settings(settings | change, coded.arrays)
    outer = coded.arrays["outer"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="`outer` has entries that are not finite"):
        quantized_from_settings(settings, coded.arrays | {"outer": outer})
    with pytest.raises(ValueError, match="scales has shape"):
        quantized_from_settings(settings, coded.arrays | {"scales": coded.arrays["codes"]})
    with pytest.raises(ValueError, match="has the arrays .*, and these are "):
        quantized_from_settings(settings, coded.arrays | {"other": coded.arrays["codes"]})


# Errors and warnings


def test_blocks_that_do_not_divide_raise_or_warn():
    with pytest.raises(SpecError, match=r"`w` has shape \(60, 8\), and blocks of 64 divide none"):
        quantize({"w": normal(0, 60, 8)}, {"w": NF4(64)})
    params = {"w": normal(0, 60, 8), "v": normal(1, 8, 64)}
    function = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    with pytest.warns(UnquantizedWarning, match=r"`w` has shape \(60, 8\)"):
        frozen = quantize(params, Int8(8), fn=function, args=(normal(2, 3, 60),))
    assert quantized(frozen) == {"v"}
    with pytest.raises(SpecError, match=r"finds no weight .*\n  `v` has .*\n  `w` has shape"):
        quantize(params, Int8(7), fn=function, args=(normal(2, 3, 60),))


def test_quantizing_twice_raises():
    frozen = quantize(PARAMS, "int8", fn=model, args=(IDS,))
    with pytest.raises(SpecError, match="`layers` is quantized already"):
        quantize(frozen, "int8", fn=model, args=(IDS,))
    with pytest.raises(SpecError, match="`up` is quantized already"):
        quantize(frozen, dict.fromkeys(PARAMS) | {"up": "nf4"})


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_weights_that_are_not_finite_raise(value, format):
    with pytest.raises(SpecError, match="`w` has entries that are not finite"):
        quantize({"w": normal(0, 64, 8).at[3, 2].set(value)}, {"w": format})


def test_backend_without_a_dtype_raises(monkeypatch):
    def fails(*_, **__):
        raise NotImplementedError("no such type")

    monkeypatch.setattr("lorax._quantize._computes_with", fails)
    with pytest.raises(SpecError, match="`w`: JAX .* does not compute with int8: no such type"):
        quantize({"w": normal(0, 64, 8)}, {"w": "int8"})


def test_invalid_arguments_raise():
    with pytest.raises(SpecError, match="'nf5' is not a format; .* 'nf4'"):
        quantize(PARAMS, "nf5", fn=model, args=(IDS,))
    with pytest.raises(TypeError, match="With one format for all weights, quantize needs `fn`"):
        quantize(PARAMS, "nf4")
    with pytest.raises(SpecError, match="must have the structure of the parameters"):
        quantize(PARAMS, {"up": "nf4"})
    with pytest.raises(SpecError, match="`norm` is float32 .* two or more axes"):
        quantize(PARAMS, dict.fromkeys(PARAMS) | {"norm": "int8"})
    with pytest.raises(SpecError, match="NF4 has block=16; it must be from 32 to 4096"):
        NF4(16)
    with pytest.raises(SpecError, match="FP8 has kind='e4m2'; it must be one of 'e4m3', 'e5m2'"):
        FP8("e4m2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="block=0; it must be"):
        Int4(0)
    _, tunable = init_lora({"w": normal(0, 6, 5)}, {"w": 1}, jax.random.key(0))
    with pytest.raises(lorax.PairError, match="this one has adapters"):
        quantize(tunable, {"w": "int8"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": IDS}, "`args` must be a tuple .*, not an ArrayImpl"),
        ({"fn": "model"}, "`fn` must be a function, not a str"),
        ({"args": (IDS,), "kwargs": [1]}, "`kwargs` must be a dict"),
        ({"args": (IDS,), "where": 3}, "A filter on paths is a glob"),
    ],
)
def test_argument_of_a_wrong_type_raises(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        quantize(PARAMS, "int8", **{"fn": model} | arguments)


@pytest.mark.parametrize("option", [{"where": "up"}, {"tables": True}])
def test_options_of_one_format_raise_with_a_tree_of_formats(option):
    with pytest.raises(ArgumentError, match=f"`{next(iter(option))}` selects weights"):
        quantize(PARAMS, dict.fromkeys(PARAMS) | {"up": "int8"}, **option)


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        (Int8, {"block": 16.0}, "Int8 has block=16.0; it must be int or None"),
        (Int8, {"block": True}, "Int8 has block=True"),
        (Int4, {"symmetric": "no"}, "Int4 has symmetric='no'; it must be bool"),
        (MXFP4, {"block": None}, "MXFP4 has block=None; it must be int"),
        (NF4, {"along": 0}, r"NF4 has along=0; it must be tuple\[int, ...\] or None"),
    ],
)
def test_setting_of_a_wrong_type_raises(format, settings, message):
    with pytest.raises(SpecError, match=message):
        format(**settings)


def test_settings_may_be_numpy_numbers_and_lists():
    assert Int8(np.int64(16), along=[1]) == Int8(16, along=(1,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 64, 3)])
def test_weights_without_entries_raise(shape):
    with pytest.raises(SpecError, match=rf"`w` has shape {re.escape(str(shape))}: it has no ent"):
        quantize({"w": jnp.zeros(shape)}, {"w": "int8"})


def test_weight_whose_codes_would_be_larger_is_not_quantized():
    """With one input, each entry would need a scale. A format given by path is still used."""
    params = {"time": normal(0, 1, 64), "w": normal(1, 64, 8)}
    function = lambda p, x: jnp.tanh(x @ p["time"]) @ p["w"]  # noqa: E731
    with pytest.warns(UnquantizedWarning, match=r"`time` .* takes 40 bits .* float32 takes 32"):
        frozen = quantize(params, "int8", fn=function, args=(normal(2, 3, 1),))
    assert quantized(frozen) == {"w"}
    assert quantized(quantize(params, {"time": "int8", "w": None})) == {"time"}


def test_weights_of_one_shape_are_traced_once(monkeypatch):
    traces, encode = [], Int8.encode
    monkeypatch.setattr(Int8, "encode", lambda *args: traces.append(args) or encode(*args))
    params = {name: normal(k, 58, 7) for k, name in enumerate("abc")}
    function = lambda p, x: sum(x @ w for w in p.values())  # noqa: E731
    quantize(params, "int8", fn=function, args=(normal(3, 2, 58),))
    assert len(traces) == 1


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_shapes_are_quantized_to_shapes(format):
    weight = normal(0, 128, 256)
    coded = quantize({"w": weight}, {"w": format})
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)
    placed = quantize({"w": jax.device_put(weight, sharding)}, {"w": format})
    for given, expected in ((jax.eval_shape(lambda x: x, weight), coded), (shape, placed)):
        shapes = quantize({"w": given}, {"w": format})
        assert jax.tree.structure(shapes) == jax.tree.structure(expected)
        for leaf, array in zip(*map(jax.tree.leaves, (shapes, expected)), strict=True):
            assert isinstance(leaf, jax.ShapeDtypeStruct)
            assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype)
            assert given is not shape or leaf.sharding == array.sharding
        floats = dequantize(shapes)["w"]
        assert isinstance(floats, jax.ShapeDtypeStruct) and floats.shape == weight.shape
        assert given is not shape or floats.sharding == sharding


def test_full_training_of_a_quantized_weight_raises():
    frozen = quantize({"w": normal(0, 64, 8)}, {"w": "int8"})
    with pytest.raises(SpecError, match="`w` is quantized, and codes have no gradient"):
        init_lora(frozen, {"w": LORA_FULL}, jax.random.key(0))


# With adapters


KINDS = {
    "dora": DoraSpec(LoraSpec(2, alpha=4)),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "vera": VeraSpec(3),
    "loha": LohaSpec(2, alpha=4),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=() if k in ("dora", "ia3-in") else pytest.mark.full_product)
        for k in KINDS
    ],
)
def test_adapters_of_other_kinds(kind):
    """Values and gradients equal those on the dequantized base, and only codes are residuals."""
    params, x = {"w": normal(0, 3, 64, 64), "head": normal(1, 64, 10)}, normal(2, 5, 64)

    def function(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])
        return x @ p["head"]

    coded = quantize(params, NF4(32), fn=function, args=(x,))
    plain = dequantize(coded)
    spec = lorax.infer_spec(function, coded, x, spec=KINDS[kind])
    assert spec == lorax.infer_spec(function, params, x, spec=KINDS[kind])
    frozen, tunable = init_lora(coded, spec, jax.random.key(0))
    tunable = jax.tree.map(
        lambda start, drawn: start + drawn / 4, tunable, random_factors(tunable, jax.random.key(1))
    )
    floats = dequantize(frozen)
    assert jax.tree.structure(floats) == jax.tree.structure(
        init_lora(plain, spec, jax.random.key(0)).frozen
    )

    def loss(tunable, frozen):
        adapted = lora(function, on_materialize="error")
        return jnp.sum(jnp.sin(adapted((frozen, tunable), x)))

    run = jax.jit(jax.value_and_grad(loss))
    for got, expected in zip(
        *map(jax.tree.leaves, (run(tunable, frozen), run(tunable, floats))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    _, tangent = jax.linearize(jax.jit(lambda tunable: loss(tunable, frozen)), tunable)
    kept = jax.make_jaxpr(tangent)(tunable).consts
    floats = [array for array in kept if jnp.issubdtype(array.dtype, jnp.floating)]
    assert not [array.shape for array in floats if array.size >= params["w"].size]


def test_merges_to_floats_and_to_codes():
    params, x = {"w": normal(0, 64, 16), "v": normal(1, 16, 8), "b": jnp.ones(8)}, normal(2, 3, 64)
    function = lambda p, x: x @ p["w"] @ p["v"] + p["b"][None]  # noqa: E731
    coded = quantize(params, Int8(), fn=function, args=(x,))
    frozen, tunable = init_lora(coded, {"w": 2, "v": 0, "b": 0}, jax.random.key(0))
    tunable = random_factors(tunable, jax.random.key(1))
    merged = merge_params(frozen, tunable)
    assert not quantized(merged) and merged["b"] is params["b"]
    np.testing.assert_allclose(
        function(merged, x), lora(function)((frozen, tunable), x), rtol=1e-5, atol=1e-5
    )
    again, errors = merge_params(frozen, tunable, requantize=True)
    assert quantized(again) == {"w", "v"} and again["v"] is frozen["v"]
    error = jnp.linalg.norm(again["w"].array() - merged["w"]) / jnp.linalg.norm(merged["w"])
    assert errors.keys() == {"w"} and 0 < errors["w"] < 0.01
    np.testing.assert_allclose(errors["w"], error, rtol=1e-4)
    np.testing.assert_array_equal(lorax.materialize(frozen["w"], tunable["w"]), merged["w"])
    traced = jax.jit(lambda *pair: merge_params(*pair, requantize=True))(frozen, tunable)
    np.testing.assert_array_equal(traced.params["w"].array(), again["w"].array())
    np.testing.assert_allclose(traced.errors["w"], errors["w"], rtol=1e-5)


def test_invalid_requantized_merge_raises():
    frozen, tunable = init_lora(quantize({"w": normal(0, 64, 16)}, {"w": "int8"}), {"w": 2}, KEY)
    name: Any = "nf4"
    with pytest.raises(ArgumentError, match="requantize='nf4'; it must be a bool"):
        merge_params(frozen, tunable, requantize=name)
    diverged = jax.tree.map(lambda factor: factor * jnp.nan, tunable)
    with pytest.raises(SpecError, match="`w` has entries that are not finite"):
        merge_params(frozen, diverged, requantize=True)


def test_base_without_adapters():
    frozen = quantize(PARAMS, "int8", fn=model, args=(IDS,))
    no_adapters = dict.fromkeys(PARAMS)
    got = lora(model, on_materialize="error")((frozen, no_adapters), IDS)
    np.testing.assert_allclose(got, model(dequantize(frozen), IDS), rtol=1e-5, atol=1e-6)


def test_count_params_and_explain():
    frozen = quantize(PARAMS, "nf4", fn=model, args=(IDS,), tables=True)
    assert count_params(frozen) == count_params(PARAMS)
    function = lambda p, ids: model(p | {"up": jnp.sort(p["up"], 0)}, ids)  # noqa: E731
    spec = dict.fromkeys(PARAMS, 0) | {"layers": LoraSpec(2, shared_axes=[0])}
    pair = init_lora(frozen, spec, jax.random.key(0))
    explanation = explain(function, pair, IDS)
    assert explanation.total == count_params(PARAMS)
    assert explanation.tunable_bytes == 4 * count_params(pair.tunable)
    coded = [leaf for leaf in frozen.values() if isinstance(leaf, QuantizedWeight)]
    others = sum(leaf.nbytes for leaf in frozen.values() if not isinstance(leaf, QuantizedWeight))
    assert explanation.frozen_bytes == sum(leaf.nbytes for leaf in coded) + others
    assert explanation.quantized == sum(leaf.size for leaf in coded)
    assert explanation.bits is not None and 4.1 < explanation.bits < 5
    assert {(path, primitive) for path, primitive, _ in explanation.decoded} == {("up", "sort")}
    assert "`up` is decoded to a whole array for `sort`" in str(explanation)
    assert re.search(r"are stored in 4\.\d\d bits each", str(explanation))


def test_uncovered_use_of_a_quantized_weight_raises():
    frozen = quantize({"w": normal(0, 64, 8)}, {"w": "int8"})
    pair = init_lora(frozen, {"w": 1}, jax.random.key(0))
    with pytest.raises(lorax.MaterializeError, match="`w` is used by `sort`"):
        lora(lambda p, x: x @ jnp.sort(p["w"]), on_materialize="error")(pair, normal(1, 2, 64))


def test_quantizes_the_base_of_frozen_factors():
    params = {"w": normal(0, 64, 8)}
    frozen, tunable = init_lora(params, {"w": DoraSpec(2)}, jax.random.key(0))
    coded = quantize(frozen, {"w": Int8()})
    assert isinstance(coded["w"], lorax.FrozenWeight)
    assert isinstance(coded["w"].base, QuantizedWeight)
    got = lora(lambda p, x: x @ p["w"])((coded, tunable), normal(1, 2, 64))
    # The magnitudes are the norms of the original weight.
    decoded = coded["w"].base.array()
    gain = jnp.linalg.norm(params["w"], axis=0) / jnp.linalg.norm(decoded, axis=0)
    expected = normal(1, 2, 64) @ (decoded * gain[None])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_frozen_factors_are_committed_like_their_base():
    device = jax.devices()[0]
    for params, committed in (
        ({"w": normal(0, 64, 8)}, False),
        ({"w": jax.device_put(normal(0, 64, 8), device)}, True),
    ):
        frozen, _ = init_lora(params, {"w": DoraSpec(2)}, jax.random.key(0))
        square = quantize(frozen, {"w": Int8()})["w"].factors["square"]
        assert square.committed is committed
        decoded = dequantize(quantize(params, {"w": Int8()}))["w"]
        np.testing.assert_allclose(square, (decoded**2).sum(0), rtol=1e-5)


def test_exports():
    pytest.importorskip("flatbuffers")
    frozen = quantize({"w": normal(0, 64, 8)}, {"w": NF4()})
    pair, x = init_lora(frozen, {"w": 2}, jax.random.key(0)), normal(1, 2, 64)
    adapted = jax.jit(lora(lambda p, x: x @ p["w"]))
    data = jax.export.export(adapted)(pair, x).serialize()
    exported = jax.export.deserialize(bytearray(data))
    np.testing.assert_allclose(exported.call(pair, x), adapted(pair, x), rtol=1e-6)


def test_eval_shape():
    function = lambda p, x: x @ p["w"]  # noqa: E731
    shapes = {"w": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)
    frozen = jax.eval_shape(lambda p: quantize(p, "nf4", fn=function, args=(x,)), shapes)
    pair = jax.eval_shape(lambda p: init_lora(p, {"w": 2}, jax.random.key(0)), frozen)
    assert pair.frozen["w"].shape == (64, 8) and pair.tunable["w"].a.dtype == jnp.float32
    assert jax.eval_shape(lora(function), pair, x).shape == (2, 8)


def test_vmap_over_bases():
    """Each member of an ensemble has its own codes."""
    stacked, x = normal(0, 3, 64, 8), normal(1, 2, 64)
    quantize_one = lambda w: quantize({"w": w}, {"w": NF4(32)})  # noqa: E731
    frozen = jax.vmap(quantize_one)(stacked)
    run = lambda f, x: lora(lambda p, x: x @ p["w"])((f, {"w": None}), x)  # noqa: E731
    got = jax.vmap(run, (0, None))(frozen, x)
    expected = jnp.stack([x @ dequantize(quantize_one(w))["w"] for w in stacked])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", [Int8(), Int4(8), FP8(block=8, square=True), NF4(32)], ids=str)
def test_leading_axes_of_a_stack_are_mapped_and_indexed_array_by_array(format):
    """Square weights: applied along another axis, scales would still broadcast."""
    frozen = quantize({"w": normal(0, 64, 64, 64)}, {"w": format})
    plain, x = dequantize(frozen)["w"], normal(1, 2, 64)
    run = lambda f, x: lora(lambda p, x: x @ p["w"])((f, {"w": None}), x)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(run, (0, None))(frozen, x), x @ plain, rtol=1e-5, atol=1e-5)
    got, _ = jax.lax.scan(lambda x, f: (jnp.tanh(run(f, x)), None), x, frozen)
    expected, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, plain)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    second = jax.tree.map(lambda array: array[1], frozen)
    np.testing.assert_array_equal(dequantize(second)["w"], plain[1])
    stacked = dequantize(jax.tree.map(lambda *arrays: jnp.stack(arrays), second, second))["w"]
    np.testing.assert_array_equal(stacked, jnp.stack([plain[1], plain[1]]))
    with pytest.raises(ArgumentError, match="indexed or mapped along an axis that shares scales"):
        dequantize(jax.tree.map(lambda array: array[0], second))


def test_arrays_that_do_not_fit_raise():
    """They would broadcast, to other numbers."""
    frozen = quantize({"w": normal(0, 64, 8)}, {"w": NF4(32)})
    run = lambda frozen: lora(lambda p: p["w"] * 2)((frozen, {"w": None}))  # noqa: E731
    cast = jax.tree.map(lambda array: array.astype(jnp.bfloat16), frozen)
    arrays = frozen["w"].arrays
    cut = dataclasses.replace(frozen["w"], arrays=arrays | {"scales": arrays["scales"][:1]})
    for each in (run, dequantize):
        with pytest.raises(ArgumentError, match="'nf4' does not have codes in bfloat16"):
            each(cast)
        with pytest.raises(ArgumentError, match=r"scales has shape \(1, 8\) and should have"):
            each({"w": cut})


WITH_FROZEN_FACTORS = {
    "dora": DoraSpec(LoraSpec(3)),
    "delora": DeloraSpec(3),
    "tokens": TokensSpec((1, 4, 6)),
}


@pytest.mark.parametrize("kind", WITH_FROZEN_FACTORS)
@pytest.mark.parametrize("format", [Int8(), MXFP4()], ids=str)
def test_frozen_factors_are_those_of_the_quantized_base(kind, format):
    params, spec = {"w": normal(0, 64, 24)}, {"w": WITH_FROZEN_FACTORS[kind]}
    frozen, tunable = init_lora(params, spec, jax.random.key(1))
    tunable = random_factors(tunable, jax.random.key(2))
    frozen = quantize(frozen, {"w": format})
    x = normal(3, 5, 64)
    expected = x @ merge_params(frozen, tunable)["w"]
    got = lora(lambda params, x: x @ params["w"])((frozen, tunable), x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # The order of the two calls makes no difference to the frozen tree.
    other = init_lora(quantize(params, {"w": format}), spec, jax.random.key(1)).frozen
    assert jax.tree.structure(frozen) == jax.tree.structure(other)
    for leaf, wanted in zip(jax.tree.leaves(frozen), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf.astype(float), wanted.astype(float), rtol=1e-5)


def test_frozen_factors_of_an_unchanged_base_are_the_same_arrays():
    frozen, _ = init_lora(
        {"w": normal(0, 64, 24), "v": normal(0, 64, 24)},
        {"w": DoraSpec(3), "v": 3},
        jax.random.key(1),
    )
    square = frozen["w"].factors["square"]
    assert quantize(frozen, {"w": None, "v": Int8()})["w"].factors["square"] is square


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float8_e4m3fn], ids=["complex", "float8"])
def test_weights_of_other_dtypes_stay_with_a_warning(dtype):
    params = {"w": normal(0, 64, 8), "other": normal(1, 8, 3).astype(dtype)}
    fn = lambda p, x: (x @ p["w"]).astype(p["other"].dtype) @ p["other"]  # noqa: E731
    with pytest.warns(UnquantizedWarning, match=f"`other` is {jnp.dtype(dtype).name}"):
        frozen = quantize(params, Int8(), fn=fn, args=(normal(2, 5, 64),))
    assert frozen["other"] is params["other"] and isinstance(frozen["w"], QuantizedWeight)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weight_with_other_arrays_than_its_format_raises(change):
    weight = quantize({"w": jnp.ones((64, 3))}, {"w": "nf4"})["w"]
    arrays = dict(weight.arrays)
    if change == "missing":
        del arrays["outer"]
    else:
        arrays["zeros"] = arrays["scales"]
    with pytest.raises(ArgumentError, match="NF4.* has the arrays .*, and these are "):
        quantized_from_settings(weight.settings(), arrays)

"""compressed-tensors: bits and blocks, from shapes and from the config."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax import dequantize
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterWarning,
    Linear,
    UnsupportedAdapterError,
    load_base,
)

RANDOM = np.random.default_rng(0)


def load(folder, tensors, *schemes, settings=None, **options):
    named = {f"up.{name}": tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(named, folder / "model.safetensors")
    groups = {f"group_{k}": {"weights": scheme} for k, scheme in enumerate(schemes)}
    settings = {
        "quant_method": "compressed-tensors", "config_groups": groups, **(settings or {})
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return load_base(folder, {"up": Linear("up")}, **options)["up"]


def fp8(shape, sides):
    """Codes with a scale for each block, and the decoded weight (in, out)."""
    out, inputs = shape
    codes = RANDOM.normal(size=shape).astype(jnp.float8_e4m3fn)
    counts = [-(-size // side) for size, side in zip(shape, sides, strict=True)]
    scales = RANDOM.uniform(0.5, 1, counts).astype(np.float32)
    each = scales[np.arange(out) // sides[0]][:, np.arange(inputs) // sides[1]]
    return {"weight": codes, "weight_scale": scales}, (codes.astype(np.float32) * each).T


def block(*sides, kind="float"):
    return {"type": kind, "num_bits": 8, "strategy": "block", "block_structure": [*sides]}


CUT = [((100, 200), (64, 64)), ((1, 200), (64, 64)), ((40, 200), (1, 128)), ((96, 100), (32, 64))]


@pytest.mark.parametrize("shape, sides", CUT)
def test_partial_blocks_have_the_size_in_the_config(tmp_path, shape, sides):
    """The same scales would fit equal parts of each axis."""
    tensors, expected = fp8(shape, sides)
    with pytest.warns(AdapterWarning, match="blocks in memory are shorter"):
        held = load(tmp_path, tensors, block(8, 8, kind="int"), block(*sides))
    np.testing.assert_array_equal(dequantize(held), expected)
    with pytest.raises(AdapterFileError, match="`up.weight_scale` .* no config says which entries"):
        load(tmp_path, tensors)
    with pytest.raises(AdapterFileError, match=r"and its config says blocks of \[\(7, 9\)\]"):
        load(tmp_path, tensors, block(7, 9))


def test_config_of_another_type_raises(tmp_path):
    tensors, _ = fp8((8, 64), (8, 32))
    with pytest.raises(AdapterFileError, match="`up.weight` in codes of the type float"):
        load(tmp_path, tensors, integers(8))


def test_power_of_two_scales(tmp_path):
    """MXFP8: a byte for each 32 inputs."""
    tensors, _ = fp8((6, 64), (1, 32))
    exponents = RANDOM.integers(120, 134, (6, 2), dtype=np.uint8)
    held = load(tmp_path, {**tensors, "weight_scale": exponents})
    scales = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)
    expected = (tensors["weight"].astype(np.float32) * scales).T
    assert held.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantize(held).astype(jnp.float32), expected)
    exponents[2, 1] = 255  # NaN
    with pytest.raises(Exception, match="`up/scales` holds NaN"):
        load(tmp_path, {**tensors, "weight_scale": exponents})


def packed(out, inputs, bits, groups=None):
    """4- or 8-bit codes in words, with scales by group, and the decoded weight (in, out)."""
    codes = RANDOM.integers(0, 1 << bits, (out, inputs), dtype=np.uint8)
    padded = np.pad(codes, ((0, 0), (0, -inputs % (32 // bits)))).astype(np.uint32)
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    words = np.bitwise_or.reduce(padded.reshape(out, -1, 32 // bits) << shifts, -1).view(np.int32)
    groups = np.zeros(inputs, np.int64) if groups is None else groups
    scales = RANDOM.normal(size=(out, groups.max() + 1)).astype(np.float16)
    tensors = {
        "weight_packed": words,
        "weight_scale": scales,
        "weight_shape": np.array([out, inputs]),
    }
    steps = codes.astype(np.int16) - (1 << bits - 1)
    return tensors, (steps.astype(np.float16) * scales[:, groups]).T


def integers(bits, **settings):
    return {"type": "int", "num_bits": bits, "strategy": "channel", **settings}


@pytest.mark.parametrize("bits, inputs", [(4, 8), (8, 4), (4, 40), (8, 40)])
def test_packed_codes_of_each_number_of_bits(tmp_path, bits, inputs):
    tensors, expected = packed(5, inputs, bits)
    np.testing.assert_array_equal(dequantize(load(tmp_path, tensors, integers(bits))), expected)
    if inputs < 32:  # as many words as for other bits
        with pytest.raises(AdapterFileError, match="1 words .* no config says the bits"):
            load(tmp_path, tensors)
    else:
        np.testing.assert_array_equal(dequantize(load(tmp_path, tensors)), expected)
    with pytest.raises(AdapterFileError, match="and its config says 2 bits"):
        load(tmp_path, packed(5, 40, bits)[0], integers(2))


def test_other_numbers_of_bits(tmp_path):
    tensors, _ = packed(5, 64, 4)
    tensors["weight_packed"] = tensors["weight_packed"][:, :6]
    with pytest.raises(UnsupportedAdapterError, match="`up.weight_packed` in codes of 3 bits"):
        load(tmp_path, tensors)
    # 7 bits with a gap at the end of each word fill as many words as 8 bits.
    tensors, _ = packed(5, 64, 8)
    with pytest.raises(UnsupportedAdapterError, match="in codes of 7 bits"):
        load(tmp_path, tensors, integers(7))


@pytest.mark.parametrize("bits", [4, 8])
def test_reordered_groups(tmp_path, bits):
    groups = RANDOM.permutation(64) // 16
    tensors, expected = packed(6, 64, bits, groups)
    tensors["weight_g_idx"] = groups.astype(np.int32)
    scheme = integers(bits, strategy="group", group_size=16)
    with pytest.raises(Exception, match="`up` that cannot be kept: its groups are not neighbors"):
        load(tmp_path, tensors, scheme)
    with pytest.warns(AdapterWarning, match=r"`up` \(as floats: its groups are not neighbors"):
        floats = load(tmp_path, tensors, scheme, requantize="float")
    np.testing.assert_array_equal(floats, expected)
    tensors["weight_g_idx"][3] = 4
    with pytest.raises(AdapterFileError, match="a group without a scale in `up.weight_g_idx`"):
        load(tmp_path, tensors, scheme)


def test_one_zero_point_for_a_weight(tmp_path):
    tensors, _ = packed(6, 64, 4)
    tensors["weight_scale"] = np.array([0.5], np.float16)
    tensors["weight_zero_point"] = np.array([-3], np.int8)
    held = load(tmp_path, tensors, integers(4, strategy="tensor", symmetric=False))
    del tensors["weight_zero_point"]
    symmetric = load(tmp_path, tensors, integers(4, strategy="tensor"))
    np.testing.assert_array_equal(dequantize(held), dequantize(symmetric) + np.float16(1.5))
    tensors["weight_zero_point"] = np.array([-9], np.int8)
    with pytest.raises(AdapterFileError, match="`up.weight_zero_point` outside the range of 4"):
        load(tmp_path, tensors, integers(4, strategy="tensor", symmetric=False))


@pytest.mark.parametrize("is_packed", [False, True])
def test_zero_points_that_the_config_says_and_the_file_lacks(tmp_path, is_packed):
    tensors, _ = packed(6, 64, 8)
    if not is_packed:
        codes = tensors.pop("weight_packed").view(np.int8)
        tensors = {"weight": codes, "weight_scale": tensors["weight_scale"]}
    with pytest.raises(AdapterFileError, match="lacks `up.weight_zero_point`, and its config says"):
        load(tmp_path, tensors, integers(8, symmetric=False))
    load(tmp_path, tensors, integers(8, symmetric=False), integers(8))


GROUPED = integers(4, strategy="group", group_size=16)
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": (GROUPED | {"strategy": "spiral"}, "the strategy 'spiral'"),
    "no size of groups": (GROUPED | {"group_size": None}, "the strategy 'group' of None"),
    "no size of blocks": (GROUPED | {"strategy": "block"}, "the strategy 'block' of None"),
    "type": (GROUPED | {"type": "posit"}, "the type 'posit' in 4 bits"),
    "bits": (GROUPED | {"num_bits": "four"}, "the type 'int' in 'four' bits"),
    "groups without g_idx": (GROUPED | {"actorder": "group"}, "lacks `up.weight_g_idx`"),
    "symmetric": (GROUPED | {"zeros": True}, "has `up.weight_zero_point`, and its config says"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_or_contradictory_schemes_raise(tmp_path, case):
    tensors, _ = packed(8, 64, 4, np.arange(64) // 16)
    scheme, message = UNKNOWN[case]
    if scheme.get("zeros"):
        tensors["weight_zero_point"] = np.zeros((1, 4), np.int32)
    with pytest.raises(AdapterError, match=message):
        load(tmp_path, tensors, scheme)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "marlin-24"}, "in the format 'marlin-24'"),
    "format of a group": (
        {"config_groups": {"a": {"weights": GROUPED, "format": "mxfp6-pack-quantized"}}},
        "in the format 'mxfp6-pack-quantized'",
    ),
    "preset": ({"config_groups": {"W4A16": ["Linear"]}}, "the name 'W4A16' in place of a scheme"),
    "groups": ({"config_groups": [GROUPED]}, "`config_groups` that are not an object"),
    "ignored": ({"ignore": ["up"]}, "says in `ignore` that the module is not quantized"),
    "ignored by pattern": ({"ignore": ["re:.p"]}, "says in `ignore`"),
    "pattern": ({"ignore": ["re:("]}, "is not a regular expression"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_unknown_or_contradictory_settings_raise(tmp_path, case):
    tensors, expected = packed(8, 64, 4, np.arange(64) // 16)
    settings, message = SETTINGS[case]
    with pytest.raises(AdapterError, match=message):
        load(tmp_path, tensors, GROUPED, settings=settings)
    held = load(tmp_path, tensors, GROUPED, settings={"ignore": ["re:p", "upper"], "format": None})
    np.testing.assert_array_equal(dequantize(held), expected)


@pytest.mark.parametrize("scheme", [
    {"num_bits": 4, "group_size": 16}, GROUPED | {"strategy": "GROUP", "type": "INT"},
])  # fmt: skip
def test_schemes_are_completed_like_the_library(tmp_path, scheme):
    tensors, expected = packed(8, 64, 4, np.arange(64) // 16)
    np.testing.assert_array_equal(dequantize(load(tmp_path, tensors, scheme)), expected)
    with pytest.raises(AdapterFileError, match=r"its config says blocks of \[\(1, 8\)\]"):
        load(tmp_path, tensors, scheme | {"group_size": 8})


def test_blocks_of_the_config_as_text(tmp_path):
    tensors, expected = fp8((64, 64), (16, 32))
    scheme = block() | {"block_structure": "16x32"}
    np.testing.assert_array_equal(dequantize(load(tmp_path, tensors, scheme)), expected)
    with pytest.raises(AdapterFileError, match=r"its config says blocks of \[\(32, 16\)\]"):
        load(tmp_path, tensors, block() | {"block_structure": "32x16"})


def test_schemes_are_those_of_the_targets(tmp_path):
    tensors, expected = packed(8, 64, 4, np.arange(64) // 16)
    asymmetric = {"weights": GROUPED | {"symmetric": False}}
    symmetric = {"weights": GROUPED, "targets": ["re:.*p$"]}
    other = asymmetric | {"targets": ["re:down"]}

    def loaded(**groups):
        return load(tmp_path, tensors, settings={"config_groups": groups})

    for targets in (["Linear"], ["down"], ["re:down"]):
        held = loaded(a=asymmetric | {"targets": targets}, b=symmetric)
        np.testing.assert_array_equal(dequantize(held), expected)
    for targets in (["up"], ["re:u"]):
        with pytest.raises(AdapterFileError, match=r"lacks `up.weight_zero_point`"):
            loaded(a=asymmetric | {"targets": targets}, b=symmetric | {"targets": ["Linear"]})
    with pytest.raises(AdapterFileError, match=r"lacks `up.weight_zero_point`"):
        loaded(a=asymmetric | {"targets": ["Linear"]}, b=symmetric | {"targets": ["down"]})
    with pytest.raises(AdapterFileError, match=r"lacks `up.weight_zero_point`"):
        loaded(a=other)  # names of the config may have another prefix


def test_blocks_that_are_the_same_for_a_small_weight(tmp_path):
    tensors, expected = fp8((64, 128), (64, 128))
    tensor = block() | {"strategy": "tensor", "block_structure": None}
    held = load(tmp_path, tensors, tensor, block(128, 128))
    np.testing.assert_array_equal(dequantize(held), expected)


def test_8_bit_integers_with_reordered_groups(tmp_path):
    groups = RANDOM.permutation(64) // 16
    tensors, expected = packed(6, 64, 8, groups)
    codes = tensors.pop("weight_packed").view(np.uint8) ^ 128
    tensors = {
        "weight": codes.view(np.int8), "weight_scale": tensors["weight_scale"],
        "weight_g_idx": groups.astype(np.int32),
    }  # fmt: skip
    scheme = integers(8, strategy="group", group_size=16, actorder="group")
    with pytest.warns(AdapterWarning, match=r"`up` \(as floats: its groups are not neighbors"):
        floats = load(tmp_path, tensors, scheme, requantize="float")
    np.testing.assert_array_equal(floats, expected)
    tensors["weight_g_idx"] = np.full(64, -1, np.int32)  # not reordered
    held = load(tmp_path, tensors, scheme)
    assert held.format == "int8"
    del tensors["weight_g_idx"]
    with pytest.raises(AdapterFileError, match="lacks `up.weight_g_idx`"):
        load(tmp_path, tensors, scheme)


def nvfp4():
    return {
        "weight_packed": RANDOM.integers(0, 256, (8, 32), dtype=np.uint8),
        "weight_scale": np.ones((8, 4), jnp.float8_e4m3fn),
        "weight_global_scale": np.ones(1, np.float32),
    }


READ = {
    "fp8": lambda: fp8((8, 64), (8, 32))[0],
    "nvfp4": nvfp4,
    "int4": lambda: packed(8, 64, 4)[0],
}


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("name", ["weight_smooth", "weight.perm", "qweight"])
def test_tensors_that_no_reader_uses_raise(tmp_path, form, name):
    with pytest.raises(UnsupportedAdapterError, match=f"has `up.{name}` next to `up.weight"):
        load(tmp_path, {**READ[form](), name: np.ones(8, np.float32)})


def test_fp4_of_other_blocks_needs_a_config(tmp_path):
    """Codes of 6 bits, as MXFP6 packs 32 inputs into 24 bytes."""
    tensors = {
        "weight_packed": RANDOM.integers(0, 256, (8, 24), dtype=np.uint8),
        "weight_scale": np.full((8, 1), 127, np.uint8),
    }
    with pytest.raises(AdapterFileError, match=r"FP4 of shape \(8, 48\) has blocks of 32"):
        load(tmp_path, tensors)
    with pytest.raises(AdapterFileError, match="of the type float of 4 bits, and its config says"):
        load(tmp_path, tensors, block(1, 32) | {"num_bits": 6})


@pytest.mark.parametrize("is_packed", [False, True])
def test_8_bit_scales_of_integers_raise(tmp_path, is_packed):
    """FP4 is also stored as pairs in int8, with scales that are powers of two."""
    tensors, _ = packed(8, 64, 8, np.arange(64) // 16)
    if not is_packed:
        codes = tensors.pop("weight_packed").view(np.int8)
        tensors = {"weight": codes, "weight_scale": tensors["weight_scale"]}
    tensors["weight_scale"] = np.ones((8, 4), jnp.float8_e8m0fnu)
    with pytest.raises(AdapterFileError, match="in float8_e8m0fnu, not floats of 16 or 32 bits"):
        load(tmp_path, tensors)


def test_schemes_of_other_bits_are_not_those_of_fp8(tmp_path):
    tensors, _ = fp8((8, 64), (1, 16))
    group = block() | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    with pytest.raises(AdapterFileError, match=r"its config says blocks of \[\(1, 64\)\]"):
        load(tmp_path, tensors, group, block() | {"strategy": "channel"})

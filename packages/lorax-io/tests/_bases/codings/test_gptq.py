"""GPTQ and AWQ: which inputs share a scale, from the tensors and from the config."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lorax import QuantizedWeight, dequantize
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterWarning,
    Linear,
    UnsupportedAdapterError,
    load_base,
)

OUT = 16
RANDOM = np.random.default_rng(0)


def words(codes):
    """Packs 4-bit codes along the first axis, lowest bits first."""
    eights = codes.reshape(-1, 8, *codes.shape[1:]).astype(np.uint32)
    shifts = (4 * np.arange(8, dtype=np.uint32)).reshape(-1, *[1] * (codes.ndim - 1))
    return np.bitwise_or.reduce(eights << shifts, axis=1).view(np.int32)


def gptq(groups, count):
    """The tensors of a weight whose inputs are in `groups`, and the decoded weight (in, out)."""
    codes = RANDOM.integers(0, 16, (len(groups), OUT), dtype=np.uint8)
    zeros = RANDOM.integers(0, 16, (count, OUT), dtype=np.uint8)
    scales = RANDOM.normal(size=(count, OUT)).astype(np.float16)
    tensors = {
        "qweight": words(codes),
        "qzeros": np.ascontiguousarray(words(((zeros - 1) & 15).T).T),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    steps = codes.astype(np.int16) - zeros[groups]
    return tensors, scales[groups] * steps.astype(np.float16)


def load(folder, tensors, config=None, **options):
    named = {f"up.{name}": tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(named, folder / "model.safetensors")
    settings = {"quantization_config": {"quant_method": "gptq", **config}} if config else {}
    (folder / "config.json").write_text(json.dumps(settings))
    return load_base(folder, {"up": Linear("up")}, **options)["up"]


SHORTER = pytest.warns(AdapterWarning, match="blocks in memory are shorter")


@pytest.mark.parametrize("inputs", [192, 320])
def test_partial_last_group(tmp_path, inputs):
    """Groups of 128 are not equal parts of the inputs: the last one has 64."""
    tensors, expected = gptq(np.arange(inputs) // 128, -(-inputs // 128))
    with SHORTER:
        of_groups = load(tmp_path, tensors)
    del tensors["g_idx"]
    with SHORTER:
        of_config = load(tmp_path, tensors, {"group_size": 128})
    for held in (of_groups, of_config):
        assert isinstance(held, QuantizedWeight)
        np.testing.assert_array_equal(dequantize(held), expected)
    with pytest.raises(AdapterFileError, match=f"its {inputs} inputs, and no config says the size"):
        load(tmp_path, tensors)


def test_config_with_another_group_size_raises(tmp_path):
    tensors, expected = gptq(np.arange(256) // 64, 4)
    with pytest.raises(AdapterFileError, match=r"`up.qweight` in 4 groups .* says groups of 128"):
        load(tmp_path, tensors, {"group_size": 128})
    # Other groups in some modules are stated by a pattern of their names.
    held = load(tmp_path, tensors, {"group_size": 128, "dynamic": {"+:up": {"group_size": 64}}})
    np.testing.assert_array_equal(dequantize(held), expected)
    tensors, expected = gptq(np.arange(96) // 96, 1)
    np.testing.assert_array_equal(dequantize(load(tmp_path, tensors, {"group_size": -1})), expected)


def test_zero_order_is_read_as_consecutive_groups(tmp_path):
    tensors, expected = gptq(np.arange(256) // 64, 4)
    tensors["g_idx"] = np.zeros(256, np.int32)
    with pytest.warns(AdapterWarning, match=r"all of `up.g_idx` is 0, .* 4 groups of neighbors"):
        held = load(tmp_path, tensors)
    np.testing.assert_array_equal(dequantize(held), expected)


def test_reordered_groups_are_decoded_by_rows(tmp_path):
    groups = RANDOM.permutation(256) // 64
    tensors, expected = gptq(groups, 4)
    with pytest.warns(AdapterWarning, match="its groups are not neighbors"):
        floats = load(tmp_path, tensors, requantize="float")
    np.testing.assert_array_equal(floats, expected)
    tensors["scales"][2, 3] = np.inf
    with pytest.raises(AdapterError, match="`up`"):
        load(tmp_path, tensors, requantize="float")


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_form_of_the_config(tmp_path, key):
    """The second version stores the zero point, and the first one the zero point minus one."""
    tensors, expected = gptq(np.arange(256) // 64, 4)
    held = load(tmp_path, tensors, {key: "gptq"})
    np.testing.assert_array_equal(dequantize(held), expected)
    held = load(tmp_path, tensors, {key: "gptq_v2"})
    steps = tensors["scales"][np.arange(256) // 64]
    zeros = np.asarray(held.arrays["zeros"])
    assert (zeros == (np.asarray(load(tmp_path, tensors).arrays["zeros"]) - 1) % 16).all()
    assert not np.array_equal(dequantize(held), expected) and steps.any()
    for form in ({key: "marlin"}, {"is_marlin_format": True}):
        with pytest.raises(UnsupportedAdapterError, match="in the format 'marlin'"):
            load(tmp_path, tensors, form)
    with pytest.raises(UnsupportedAdapterError, match="of qqq"):
        load(tmp_path, tensors, {"quant_method": None, "method": "qqq"})


def test_order_that_the_config_says_and_the_file_lacks(tmp_path):
    tensors, _ = gptq(np.arange(256) // 64, 4)
    load(tmp_path, tensors, {"desc_act": True})
    del tensors["g_idx"]
    load(tmp_path, tensors, {"desc_act": False})
    with pytest.raises(AdapterFileError, match="lacks `up.g_idx`, and its config says desc_act"):
        load(tmp_path, tensors, {"desc_act": True})

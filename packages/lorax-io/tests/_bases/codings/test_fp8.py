"""FP8 with `weight_scale_inv`: one scale for a weight, or for each expert."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax import dequantize
from lorax_io import AdapterFileError, Experts, Linear, load_base

RANDOM = np.random.default_rng(0)
ONE = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
NAMES = {"up": Linear("up")}


def write(folder, tensors, config):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_weight(tmp_path, shape):
    codes = RANDOM.normal(size=(6, 10)).astype(jnp.float8_e4m3fn)
    tensors = {"up.weight": codes, "up.weight_scale_inv": np.full(shape, 0.3, jnp.bfloat16)}
    held = load_base(write(tmp_path, tensors, ONE), NAMES)["up"]
    scale = np.float32(jnp.bfloat16(0.3))
    expected = (codes.astype(np.float32) * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(held).T, expected)
    with pytest.raises(AdapterFileError, match=r"`up.weight_scale_inv` of shape .*\(1, 1\) would"):
        load_base(
            write(tmp_path, tensors | {"up.weight_scale_inv": np.ones(2, np.float32)}, ONE), NAMES
        )


def test_one_scale_for_each_expert(tmp_path):
    codes = RANDOM.normal(size=(3, 6, 10)).astype(jnp.float8_e4m3fn)
    scales = RANDOM.uniform(0.5, 1, 3).astype(jnp.bfloat16)
    file = write(tmp_path, {"mlp.up": codes, "mlp.up_scale_inv": scales}, ONE)
    names = {"up": Experts("mlp", parameter="up", shared_axes=[0], out_first=True)}
    wide = codes.astype(np.float32) * scales.astype(np.float32)[:, None, None]
    held = load_base(file, names)["up"]
    np.testing.assert_array_equal(dequantize(held).swapaxes(1, 2), wide.astype(jnp.bfloat16))


def test_scales_that_are_powers_of_two(tmp_path):
    """As bytes, or as a dtype of their own."""
    codes = RANDOM.normal(size=(4, 64)).astype(jnp.float8_e4m3fn)
    exponents = np.full((4, 2), 126, np.uint8)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 32]}}
    for scales in (exponents, exponents.view(jnp.float8_e8m0fnu)):
        write(tmp_path, {"up.weight": codes, "up.weight_scale_inv": scales}, config)
        decoded = dequantize(load_base(tmp_path, NAMES)["up"]).astype(jnp.float32)
        np.testing.assert_array_equal(decoded, codes.astype(np.float32).T / 2)

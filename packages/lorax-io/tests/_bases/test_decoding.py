"""Codes that are written again, for `lorax merge --requantize`."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax_io import UnsupportedAdapterError
from lorax_io._bases.checkpoint import open_checkpoint
from lorax_io._bases.decoding import with_decoded

OUT, IN = 128, 64
draw = lambda *shape: np.random.default_rng(sum(shape)).normal(size=shape)  # noqa: E731


def test_error_of_codes_includes_the_error_of_scales(tmp_path):
    """Scales are rounded to the dtype of the file."""
    codes, scales = draw(OUT, IN).astype(jnp.float8_e4m3fn), np.abs(draw(OUT, 1))
    tensors = {"up.weight": codes, "up.weight_scale": scales.astype(jnp.bfloat16)}
    safetensors.numpy.save_file(tensors, tmp_path / "f.safetensors")
    weight = with_decoded(open_checkpoint(tmp_path / "f.safetensors")).coded["up.weight"]
    floats = draw(OUT, IN).astype(np.float32)
    after, error = weight.again(floats)
    assert {name: x.dtype for name, x in after.items()} == {n: x.dtype for n, x in tensors.items()}
    decoded = after["up.weight"].astype(np.float32) * after["up.weight_scale"].astype(np.float32)
    measured = np.linalg.norm(decoded - floats) / np.linalg.norm(floats)
    np.testing.assert_allclose(error, measured, rtol=1e-4)
    scales = after["up.weight_scale"]
    exponents = {**tensors, "up.weight_scale": scales.astype(jnp.float8_e8m0fnu)}
    safetensors.numpy.save_file(exponents, tmp_path / "f.safetensors")
    weight = with_decoded(open_checkpoint(tmp_path / "f.safetensors")).coded["up.weight"]
    with pytest.raises(
        UnsupportedAdapterError, match="`up.weight` in codes that can be read but not written"
    ):
        weight.again(floats)

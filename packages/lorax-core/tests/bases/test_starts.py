"""Initial factors on a quantized base: LoftQ, PiSSA and OLoRA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, init_lora

W = jax.random.normal(jax.random.key(8), (3, 64, 32)) / 8
STACK: Any = {"shared_axes": [0], "in_axes": [1]}


def error_of(pair):
    merged = lorax.merge_params(pair)["w"]
    return float(jnp.linalg.norm((merged - W).ravel()) / jnp.linalg.norm(W.ravel()))


@pytest.mark.parametrize(("init", "format"), [("loftq", "nf4"), ("loftq:int4", "int4")])
def test_loftq_quantizes_the_base_and_adapts_to_its_error(init, format):
    spec = LoraSpec(8, alpha=4, init=init, **STACK)
    pair = init_lora({"w": W}, {"w": spec}, jax.random.key(0))
    assert isinstance(pair.frozen["w"], lorax.QuantizedWeight)
    assert pair.frozen["w"].format == format and pair.frozen["w"].along == (-2,)
    coded = lorax.quantize({"w": W}, {"w": format})
    alone = float(jnp.linalg.norm((coded["w"].array() - W).ravel()) / jnp.linalg.norm(W.ravel()))
    # The adapter removes the 8 largest singular values of the error of each matrix.
    lost = np.linalg.svd(np.asarray(W - coded["w"].array()), compute_uv=False)[:, 8:]
    np.testing.assert_allclose(error_of(pair) * np.linalg.norm(W), np.linalg.norm(lost), rtol=1e-4)
    assert error_of(pair) < 0.8 * alone


def test_loftq_of_codes_raises():
    coded = lorax.quantize({"w": W}, {"w": "nf4"})
    with pytest.raises(lorax.SpecError, match="`w` is quantized, and init='loftq' computes"):
        init_lora(coded, {"w": LoraSpec(2, init="loftq", **STACK)}, jax.random.key(0))
    with pytest.raises(lorax.SpecError, match="'int5' is not a format"):
        init_lora({"w": W}, {"w": LoraSpec(2, init="loftq:int5", **STACK)}, jax.random.key(0))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adjusted_quantized_base_stays_quantized(init):
    coded = lorax.quantize({"w": W}, {"w": lorax.Int8(16)})
    pair = init_lora(coded, {"w": LoraSpec(4, init=init, **STACK)}, jax.random.key(0))
    assert jax.tree.structure(pair.frozen) == jax.tree.structure(coded)
    assert error_of(pair) < 0.01

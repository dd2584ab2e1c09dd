"""Initial factors that are computed from the weight: PiSSA, OLoRA and orthogonal factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    DoraSpec,
    LoraSpec,
    PairError,
    SpecError,
    adapter_difference,
    init_lora,
    merge_params,
    testing,
)

PARAMS = {"w": jax.random.normal(jax.random.key(0), (9, 6))}
STACK = {"w": jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 6))}
STACKED = {"in_axes": (1, 2), "out_axes": (3, 4), "shared_axes": (0,)}
KEY = jax.random.key(0)


@pytest.mark.parametrize("alpha, scaling", [(None, "standard"), (6, "standard"), (5, "rslora")])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("params, axes", [(PARAMS, {}), (STACK, STACKED)], ids=["one", "stack"])
def test_initial_adapter_reproduces_the_weight(init, alpha, scaling, params, axes):
    spec = LoraSpec(2, alpha, scaling, init=init, **axes)
    frozen, tunable = init_lora(params, {"w": spec}, KEY)
    np.testing.assert_allclose(merge_params(frozen, tunable)["w"], params["w"], atol=1e-5)
    assert (frozen["w"] is params["w"]) == (init == "orthogonal")
    assert jnp.abs(tunable["w"].b).max() > 0.01
    trained = jax.tree.map(lambda x: x + 0.5, tunable)
    moved = merge_params(frozen, trained)["w"]
    original = merge_params(params, adapter_difference(trained, tunable))["w"]
    assert jnp.abs(moved - params["w"]).max() > 0.1
    np.testing.assert_allclose(moved, original, atol=1e-4)


def test_pissa_base_keeps_the_small_singular_values():
    frozen, tunable = init_lora(PARAMS, {"w": LoraSpec(2, 7, init="pissa")}, KEY)
    values = np.linalg.svd(np.asarray(PARAMS["w"], np.float64))[1]
    np.testing.assert_allclose(np.linalg.svd(frozen["w"])[1][:4], values[2:], rtol=1e-5)
    weight = tunable["w"]
    gram_matrices = weight.a.T @ weight.a, weight.b @ weight.b.T
    for gram in gram_matrices:
        np.testing.assert_allclose(gram, np.diag(values[:2] / weight.scale), atol=1e-5)


def test_olora_factor_is_orthonormal():
    _, tunable = init_lora(PARAMS, {"w": LoraSpec(2, init="olora")}, KEY)
    b = tunable["w"].b
    np.testing.assert_allclose(b @ b.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adjusted_bfloat16_base_keeps_its_dtype(init):
    params = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    frozen, tunable = init_lora(params, {"w": LoraSpec(2, init=init)}, KEY)
    assert frozen["w"].dtype == jnp.bfloat16 and tunable["w"].a.dtype == jnp.float32
    merged = merge_params(frozen, tunable)["w"].astype(jnp.float32)
    np.testing.assert_allclose(merged, PARAMS["w"], atol=0.03)


def test_dora_of_pissa_reproduces_the_weight():
    spec = {"w": DoraSpec(LoraSpec(2, 4, init="pissa"))}
    frozen, tunable = init_lora(PARAMS, spec, KEY)
    np.testing.assert_allclose(merge_params(frozen, tunable)["w"], PARAMS["w"], atol=1e-5)
    testing.check(lambda p, x: x @ p["w"], PARAMS, spec, jnp.ones((3, 9)), transforms=False)


@pytest.mark.parametrize(
    "spec, message",
    [
        (LoraSpec(2, init="svd"), "`w` has init='svd'; it must be one of 'pissa'"),
        (LoraSpec(7, init="pissa"), "`w` has rank 7 and init='pissa', .* of rank 6 at most"),
        (LoraSpec(7, init="olora"), "`w` has rank 7 and init='olora'"),
        (LoraSpec(3, init="orthogonal"), "takes an even rank"),
        (LoraSpec(2, -1, init="pissa"), "alpha must be positive"),
    ],
)
def test_invalid_spec_raises(spec, message):
    with pytest.raises(SpecError, match=message):
        init_lora(PARAMS, {"w": spec}, KEY)


def test_difference_of_mismatched_trees_raises():
    _, tunable = init_lora(PARAMS, {"w": 2}, KEY)
    _, other = init_lora(PARAMS, {"w": 3}, KEY)
    with pytest.raises(PairError, match="differ in structure"):
        adapter_difference(tunable, other)
    _, dora = init_lora(PARAMS, {"w": DoraSpec(2)}, KEY)
    with pytest.raises(PairError, match="`w` has a dora adapter"):
        adapter_difference(dora, dora)


def test_orthogonal_factors_of_a_complex_weight_multiply_to_zero():
    params = {"w": jnp.ones((9, 7), jnp.complex64)}
    _, tunable = init_lora(params, {"w": LoraSpec(4, init="orthogonal")}, jax.random.key(0))
    a, b = tunable["w"].a, tunable["w"].b
    assert jnp.abs(a).min() > 0 and jnp.abs(a @ b).max() < 1e-7

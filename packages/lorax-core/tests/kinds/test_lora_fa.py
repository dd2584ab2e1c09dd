"""LoRA-FA: residuals of the backward pass, agreement with LoRA, and invalid specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    LoraFASpec,
    LoraSpec,
    PairError,
    RankWarning,
    SpecError,
    VeraSpec,
    init_lora,
    lora,
    merge_params,
)
from lorax.testing import random_factors

TOKENS, FAN_IN, FAN_OUT = 50, 8, 7


def model(params, x):
    return x @ params["w"]


def residual_shapes(spec):
    """The shapes of the residuals of one adapted product."""
    params, x = {"w": jnp.ones((FAN_IN, FAN_OUT))}, jnp.ones((TOKENS, FAN_IN))
    frozen, tunable = init_lora(params, {"w": spec}, jax.random.key(0))
    tunable = random_factors(tunable, jax.random.key(1))
    _, tangent = jax.linearize(jax.jit(lambda t: lora(model)((frozen, t), x)), tunable)
    return sorted(array.shape for array in jax.make_jaxpr(tangent)(tunable).consts)


def test_the_input_is_not_a_residual():
    assert (TOKENS, FAN_IN) in residual_shapes(LoraSpec(2, alpha=4))
    assert residual_shapes(LoraFASpec(2, alpha=4)) == [(TOKENS, 2)]


def test_the_only_activation_that_vera_keeps_has_its_rank():
    shapes = residual_shapes(VeraSpec(3))
    assert [shape for shape in shapes if TOKENS in shape] == [(TOKENS, 3)]


def test_initial_factors_are_those_of_lora():
    params = {"w": jnp.ones((2, 5, 3))}
    spec, key = {"w": LoraSpec(2, shared_axes=[0])}, jax.random.key(3)
    fa_spec = {"w": LoraFASpec(2, shared_axes=[0])}
    weight = init_lora(params, spec, key, b_init="gaussian").tunable["w"]
    frozen, tunable = init_lora(params, fa_spec, key, b_init="gaussian")
    np.testing.assert_array_equal(frozen["w"].factors["a"], weight.a)
    np.testing.assert_array_equal(tunable["w"].b, weight.b)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_merges_like_lora_with_the_same_factors(scaling):
    params, key = {"w": jnp.ones((5, 3))}, jax.random.key(3)
    lora_pair = init_lora(params, {"w": LoraSpec(2, 3, scaling)}, key, b_init="gaussian")
    pair = init_lora(params, {"w": LoraFASpec(2, 3, scaling)}, key, b_init="gaussian")
    np.testing.assert_array_equal(merge_params(pair)["w"], merge_params(lora_pair)["w"])


def test_the_frozen_factor_is_not_copied_for_the_backward_pass():
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params["w"])[0]

    params, x = {"w": jnp.ones((4, 5, 5))}, jnp.ones((2, 5))
    spec = {"w": LoraFASpec(2, in_axes=(1,), out_axes=(2,), shared_axes=(0,))}
    frozen, tunable = init_lora(params, spec, jax.random.key(0))

    def residuals(tunable, frozen):
        _, pull = jax.vjp(lambda tunable: lora(scanned)((frozen, tunable), x), tunable)
        return jax.tree.leaves(pull)

    traced = jax.make_jaxpr(residuals)(tunable, frozen).jaxpr
    shapes = [var.aval.shape for var in traced.outvars if var not in traced.invars]
    assert frozen["w"].factors["a"].shape == (4, 5, 2)
    assert (4, 5, 2) not in shapes
    assert (4, 2, 2) in shapes  # x @ a of each layer


def test_missing_frozen_factor_raises():
    frozen, tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": LoraFASpec(2)}, jax.random.key(0))
    with pytest.raises(PairError, match=r"adapter at `w` needs a \(5, 2\) next to its base"):
        lora(model)(({"w": frozen["w"].base}, tunable), jnp.ones((2, 5)))


BAD = {
    "rank 0": (LoraFASpec(0), "`w` has a LoraFASpec of rank 0; ranks begin at 1"),
    "rank 1.5": (LoraFASpec(1.5), "`w` has rank 1.5; a rank is a positive int"),  # pyright: ignore
    "alpha": (LoraFASpec(2, alpha="x"), "`w` has alpha 'x'; it must be a finite number or None"),  # pyright: ignore
    "scaling": (
        LoraFASpec(2, scaling="no"),  # pyright: ignore
        "`w` has scaling 'no'; it must be 'standard' or 'rslora'",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_invalid_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        init_lora({"w": jnp.ones((5, 3))}, {"w": spec}, jax.random.key(0))


def test_vector_raises():
    with pytest.raises(SpecError, match="`w` has 1 dimension.*give it LORA_FREEZE or LORA_FULL"):
        init_lora({"w": jnp.ones(3)}, {"w": LoraFASpec(2)}, jax.random.key(0))


def test_rank_above_that_of_the_matrix_warns():
    with pytest.warns(RankWarning, match="whose rank is at most 3"):
        init_lora({"w": jnp.ones((5, 3))}, {"w": LoraFASpec(4)}, jax.random.key(0))

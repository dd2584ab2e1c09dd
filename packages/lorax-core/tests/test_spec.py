"""Specs: `simple_spec`, `spec_from_rules`, and errors of `init_lora` that name the path."""

import re

import jax
import jax.numpy as jnp
import pytest

from lorax import (
    LORA_FREEZE,
    LORA_FULL,
    LoraSpec,
    RankWarning,
    SpecError,
    init_lora,
    simple_spec,
    spec_from_rules,
)

PARAMS = {
    "h": [{"attn": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}} for _ in range(2)],
    "head": jnp.ones((7, 11)),
    "step": jnp.zeros((), jnp.int32),
    "activation": jax.nn.relu,
    "nothing": None,
}


def init(spec, params=None):
    return init_lora({"w": jnp.ones((5, 7))} if params is None else params, spec, jax.random.key(0))


def test_simple_spec_gives_string_paths_and_arrays():
    calls = {}

    def decide(path, array):
        calls[path] = array.shape
        return 2 if "attn" in path else LORA_FREEZE

    spec = simple_spec(PARAMS, decide)
    assert calls == {"h/0/attn/kernel": (5, 7), "h/1/attn/kernel": (5, 7), "head": (7, 11)}
    assert spec["h"][1]["attn"] == {"kernel": 2, "bias": LORA_FREEZE}
    assert spec["head"] == spec["step"] == spec["activation"] == LORA_FREEZE
    init(spec, PARAMS)


def test_simple_spec_tunes_vectors_but_not_integers():
    spec = simple_spec(PARAMS, tune_vectors=True)
    assert spec["h"][0]["attn"] == {"kernel": LORA_FREEZE, "bias": LORA_FULL}
    assert spec["step"] == LORA_FREEZE
    init(spec, PARAMS)


def test_simple_spec_honors_is_leaf():
    spec = simple_spec(PARAMS, is_leaf=lambda node: isinstance(node, list))
    assert spec["h"] == LORA_FREEZE


def test_first_matching_rule_wins():
    spec = spec_from_rules(
        PARAMS,
        [("h/0/*/kernel", 3), (re.compile(r"h/\d+/attn/k"), 2), (lambda p: "bias" in p, LORA_FULL)],
    )
    assert [layer["attn"] for layer in spec["h"]] == [
        {"kernel": 3, "bias": LORA_FULL},
        {"kernel": 2, "bias": LORA_FULL},
    ]
    assert spec["head"] == LORA_FREEZE
    init(spec, PARAMS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("h/*/attn/kernl", 2)], r"'h/\*/attn/kernl' matches no parameter: the paths are `h/0"),
        ([(re.compile("kernl"), 2)], "'kernl' matches no parameter"),
        ([("*", 0), ("head", 2)], "'head' matches no parameter: earlier rules .* `head`"),
    ],
)
def test_rule_without_an_effect_raises(rules, message):
    with pytest.raises(SpecError, match=message):
        spec_from_rules(PARAMS, rules)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (True, "`w` has the spec True"),
        (False, "`w` has the spec False"),
        ("8", "`w` has the spec '8'"),
        (2.0, "`w` has the spec 2.0"),
        (None, "`w` has the spec None"),
        (-2, "`w` has rank -2"),
        (LoraSpec(0), "`w` has a LoraSpec of rank 0"),
        (LoraSpec(-1), "`w` has a LoraSpec of rank -1"),
        (LoraSpec(True), "`w` has rank True"),
        (LoraSpec(2, alpha=float("inf")), "alpha inf; it must be a finite number"),
        (LoraSpec(2, alpha="8"), "alpha '8'"),  # pyright: ignore[reportArgumentType]
        (LoraSpec(2, scaling="rs"), "scaling 'rs'"),  # pyright: ignore[reportArgumentType]
        (LoraSpec(2, in_axes=(2,)), r"in_axes=\(2,\) names an axis that it does not have"),
        (LoraSpec(2, in_axes=(0, 0)), "names an axis twice"),
        (LoraSpec(2, in_axes=(0, 1)), "at least one input and one output"),
        (LoraSpec(2, in_axes=(0,), out_axes=(0,)), "exactly one role"),
        (LoraSpec(2, shared_axes=(0,)), "at least one input and one output"),
        (LoraSpec(2, in_axes=(True,)), "does not have"),
    ],
)
def test_invalid_spec_raises_with_its_path(leaf, message):
    with pytest.raises(SpecError, match=message):
        init({"w": leaf})


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (jnp.ones(()), "0 dimensions, so it cannot take rank 2"),
        (jnp.ones(5), "1 dimension, so it cannot take rank 2"),
        (jnp.ones((5, 7), jnp.int32), "holds int32, which has no gradient"),
        (jnp.ones((5, 7), bool), "holds bool, which has no gradient"),
        (jnp.ones((0, 7)), r"has shape \(0, 7\) and no entries to adapt"),
        (jax.nn.relu, "is .*, not an array; give it LORA_FREEZE"),
        (3.0, "is float, not an array"),
    ],
)
def test_parameter_that_cannot_take_a_rank_raises_with_its_path(param, message):
    with pytest.raises(SpecError, match="`deep/0/w` (has|is|holds) ?.*"):
        init({"deep": [{"w": 2}]}, {"deep": [{"w": param}]})
    with pytest.raises(SpecError, match=message):
        init({"deep": [{"w": 2}]}, {"deep": [{"w": param}]})


def test_full_training_of_integers_raises():
    with pytest.raises(SpecError, match="`w` holds int32"):
        init({"w": LORA_FULL}, {"w": jnp.ones(5, jnp.int32)})


@pytest.mark.parametrize("leaf", [6, LoraSpec(6)])
def test_rank_above_that_of_the_matrix_warns(leaf):
    with pytest.warns(RankWarning, match=r"`w` has shape \(5, 7\): .* rank is at most 5"):
        _, tunable = init({"w": leaf})
    assert (tunable["w"].a.shape, tunable["w"].b.shape) == ((5, 6), (6, 7))


@pytest.mark.parametrize("spec", [{}, {"w": 2, "v": 0}, [2], 2, {"w": {"kernel": 2}}])
def test_spec_with_another_structure_raises(spec):
    with pytest.raises(SpecError, match="must have the structure of the parameters"):
        init(spec)


@pytest.mark.parametrize(
    ("spec", "a", "b"),
    [
        (LoraSpec(2), (3, 5, 7, 2), (2, 11)),
        (LoraSpec(2, in_axes=[0]), (3, 2), (2, 5, 7, 11)),
        (LoraSpec(2, out_axes=[-1, 1]), (3, 7, 2), (2, 5, 11)),
        (LoraSpec(2, shared_axes=[1]), (5, 3, 7, 2), (5, 2, 11)),
        (LoraSpec(2, in_axes=[-1], shared_axes=[0]), (3, 11, 2), (3, 2, 5, 7)),
        (LoraSpec(2, in_axes=[3, 0], out_axes=[1, 2]), (3, 11, 2), (2, 5, 7)),
    ],
)
def test_axes_determine_the_shapes_of_the_factors(spec, a, b):
    _, tunable = init({"w": spec}, {"w": jnp.ones((3, 5, 7, 11))})
    assert (tunable["w"].a.shape, tunable["w"].b.shape) == (a, b)

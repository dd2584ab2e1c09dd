"""Boxed parameters, with a class that has the methods of Flax's boxes (see integration-tests/)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LORA_FULL, LoraSpec, LoraWeight, PairError, init_lora, lora, merge_params, unmerge
from lorax.testing import check, random_factors

KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: Any
    names: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    def replace_boxed(self, value):
        return dataclasses.replace(self, value=value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NotABox:
    """A node that has `names` but is not a box."""

    names: Any


@pytest.mark.parametrize(
    ("spec", "names", "a", "b"),
    [
        (LoraSpec(2), ("x", "y", "z"), ("x", "y", None), (None, "z")),
        (LoraSpec(2, in_axes=[2]), ("x", "y", "z"), ("z", None), (None, "x", "y")),
        (LoraSpec(2, shared_axes=[1]), ("x", "y", "z"), ("y", "x", None), ("y", None, "z")),
        (LoraSpec(2), ("x",), ("x", None, None), (None, None)),
        (LoraSpec(2), (("x", "y"), None, "z"), (("x", "y"), None, None), (None, "z")),
    ],
)
def test_boxes_of_factors_name_their_axes(spec, names, a, b):
    base = Box(jnp.ones((3, 5, 7)), names)
    frozen, tunable = init_lora({"w": base}, {"w": Box(spec, names)}, KEY)
    assert frozen["w"].value is base.value
    assert (tunable["w"].a.names, tunable["w"].b.names) == (a, b)
    assert tunable["w"].a.value.ndim == len(a) and tunable["w"].b.value.ndim == len(b)


def model(params, x):
    return x @ params["w"].value + params["v"].value[None] + params["o"].names[None]


def make_params() -> dict[str, Any]:
    return {
        "w": Box(jax.random.normal(KEY, (5, 7)), ("x", "y")),
        "v": Box(jnp.ones(7), ("y",)),
        "o": NotABox(jnp.ones(7)),
    }


SPEC = {"w": Box(2, ("x", "y")), "v": Box(LORA_FULL, ("y",)), "o": NotABox(0)}


def test_boxed_weights_are_adapted_merged_and_unmerged():
    params, x = make_params(), jnp.ones((3, 5))
    check(model, params, SPEC, x)
    frozen, tunable = init_lora(params, SPEC, KEY)
    assert isinstance(tunable["w"], LoraWeight) and tunable["v"].names == ("y",)
    tunable = random_factors(tunable, KEY)
    merged = merge_params(frozen, tunable)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(
        lora(model)((frozen, tunable), x), model(merged, x), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        unmerge(merged, tunable)["w"].value, params["w"].value, rtol=1e-5, atol=1e-5
    )


def test_an_adapter_inside_the_box_of_its_base_is_merged():
    """As from a loader that knows only the structure of the parameters."""
    frozen, tunable = init_lora(make_params(), SPEC, KEY)
    weight = tunable["w"]
    weight = dataclasses.replace(weight, a=weight.a.value, b=weight.b.value)
    inside = tunable | {"w": Box(weight, ("x", "y"))}
    merged = merge_params(frozen, inside)
    assert jax.tree.structure(merged) == jax.tree.structure(merge_params(frozen, tunable))


@pytest.mark.parametrize("missing", ["w", "v", "o"])
def test_missing_leaf_raises(missing):
    frozen, tunable = init_lora(make_params(), SPEC, KEY)
    del tunable[missing]
    with pytest.raises(PairError, match="structure of the parameters"):
        merge_params(frozen, tunable)

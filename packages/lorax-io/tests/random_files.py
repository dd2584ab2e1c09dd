"""Helpers of property tests: trees, values, and the number of examples."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st

from lorax import LoraWeight
from lorax_io import (
    AdapterError,
    AdapterWarning,
    Linear,
    Tensor,
)


def examples(count):
    return settings(
        max_examples=count,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


NAMES = {
    "q": Linear("layers.0.q_proj"),
    "v": Linear("layers.{}.v_proj", shared_axes=(0,)),
    "norm": Tensor("norm", parameter="weight"),
}


def make_params():
    return {"q": np.ones((5, 3)), "v": np.ones((2, 5, 3)), "norm": np.ones(3, np.float32)}


def make_tunable():
    q = LoraWeight(numbers(0, (5, 2)), numbers(1, (2, 3)), rank=2, alpha=3)
    v = LoraWeight(
        numbers(2, (2, 5, 2), "bfloat16"),
        numbers(3, (2, 2, 3), "bfloat16"),
        rank=2,
        scaling="rslora",
        in_axes=(1,),
        out_axes=(2,),
        shared_axes=(0,),
    )
    return {"q": q, "v": v, "norm": numbers(4, (3,))}


def numbers(seed, shape, dtype="float32"):
    """Values with random bits, all of them finite."""
    dtype, size = jnp.dtype(dtype), math.prod(shape)
    random = np.random.default_rng(seed)
    if dtype == np.bool_:
        return random.integers(2, size=shape).astype(bool)
    array = random.integers(256, size=size * dtype.itemsize, dtype=np.uint8).view(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        with np.errstate(invalid="ignore"):
            array[~np.isfinite(array)] = 1
    return array.reshape(shape)


def assert_same_shapes(left, right):
    """Asserts the same paths and shapes."""
    shapes = [jax.tree_util.tree_leaves_with_path(jax.tree.map(np.shape, t)) for t in (left, right)]
    assert shapes[0] == shapes[1]


def load_or_refuse(load, expected):
    """Returns a tree with the shapes of `expected`, or None after the one error type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        try:
            loaded = load()
        except AdapterError:
            return
    assert_same_shapes(loaded, expected)


WORDS = st.sampled_from(
    ["LORA", "q_proj", "v_proj", "layers", "layers.0.q_proj", ".*_proj", "(q|v)_proj", "^layers"]
    + ["norm", "none", "all", "lora_only", "all-linear", "", ".", "(", "(?x)#", "a|b", r"\d"]
)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), WORDS, st.text()
)


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS | st.text(), inner, max_size=4)
    ),
    max_leaves=6,
)


SEEDS = st.integers(0, 2**32)


ALPHAS = st.none() | st.integers(0, 64) | st.floats(-100, 100)


SCALINGS = st.sampled_from(("standard", "rslora"))


@st.composite
def weights(draw):
    """A LoRA weight with axes in arbitrary roles."""
    axes = draw(st.permutations(range(draw(st.integers(2, 4)))))
    first = draw(st.integers(1, len(axes) - 1))
    second = draw(st.integers(first + 1, len(axes)))
    return make_weight(
        draw, sorted(axes[:first]), sorted(axes[first:second]), sorted(axes[second:])
    )


def make_weight(draw, inputs, outputs, shared, dtypes=("float32", "bfloat16", "float16")):
    ndim = len(inputs) + len(outputs) + len(shared)
    size = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    of = lambda axes: tuple(size[d] for d in axes)  # noqa: E731
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(dtypes))
    return LoraWeight(
        numbers(draw(SEEDS), (*of(shared), *of(inputs), rank), dtype),
        numbers(draw(SEEDS), (*of(shared), rank, *of(outputs)), dtype),
        rank=rank,
        alpha=draw(ALPHAS),
        scaling=draw(SCALINGS),
        in_axes=tuple(inputs),
        out_axes=tuple(outputs),
        shared_axes=tuple(shared),
    )


def shape_of(weight):
    """The shape of a weight's base."""
    shared = len(weight.shared_axes)
    sizes = (*weight.a.shape[:-1], *weight.b.shape[shared + 1 :])
    axes = (*weight.shared_axes, *weight.in_axes, *weight.out_axes)
    return tuple(size for _, size in sorted(zip(axes, sizes, strict=True)))


def base_of(leaf):
    if isinstance(leaf, LoraWeight):
        return jax.ShapeDtypeStruct(shape_of(leaf), jnp.float32)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

"""Random names are unchanged by a round trip through a PEFT folder."""

import dataclasses

import numpy as np
from comparing import assert_same
from hypothesis import assume, given, strategies as st
from random_files import SEEDS, base_of, examples, make_weight, numbers

from lorax import LoraWeight
from lorax_io import (
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Tensor,
    load_peft,
    save_peft,
)


@st.composite
def torch_names(draw, module):
    """A name, and a matching weight."""
    kind = draw(st.sampled_from((Linear, Conv1D, Embedding, Conv, Experts)))
    counts = [draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))]
    counts[0] += kind is Conv
    counts[2] += kind is Experts
    axes = draw(st.permutations(range(sum(counts))))
    inputs = sorted(axes[: counts[0]])
    outputs = sorted(axes[counts[0] : counts[0] + counts[1]])
    shared = sorted(axes[counts[0] + counts[1] :])
    weight = make_weight(draw, inputs, outputs, shared)
    more = {}
    if kind is Conv:
        more["channel_axis"] = draw(st.none() | st.sampled_from(inputs))
    if kind is Experts:
        more["out_first"] = draw(st.booleans())
        more["swapped"] = draw(st.sampled_from((None, True, False)))
        more["parameter"] = "down_proj"
    module += ".{}" * (len(shared) - (kind is Experts)) + ".proj"
    torch_name = kind(module, in_axes=inputs, out_axes=outputs, shared_axes=shared, **more)
    return torch_name, weight


@st.composite
def adapters(draw):
    """Names, and a matching tree."""
    names, tree = {}, {}
    for k in range(draw(st.integers(1, 3))):
        names[f"w{k}"], tree[f"w{k}"] = draw(torch_names(f"m{k}"))
    dtypes = st.sampled_from(("float32", "bfloat16", "float16"))
    if draw(st.booleans()):  # the bias of an adapted module
        names["bias"] = Tensor("own.proj", flat=True)
        names["own"] = Linear("own.proj")
        tree["bias"] = numbers(draw(SEEDS), (3, 2), draw(dtypes))
        tree["own"] = make_weight(draw, [0], [1], [])
    if draw(st.booleans()):  # a fully saved module
        names["head"] = Linear("head{}", shared_axes=(1,), out_axes=(0, 2))
        names["head bias"] = Tensor("head{}", shared_axes=(0,))
        tree["head"] = numbers(draw(SEEDS), (3, 2, 5, 4), draw(dtypes))
        tree["head bias"] = numbers(draw(SEEDS), (2, 15), draw(dtypes))
    if draw(st.booleans()):  # two parameters of one module of experts
        orders = draw(st.permutations((3, 8)))
        for order, name in zip(orders, ("up", "down"), strict=True):
            names[name] = Experts("moe.experts", shared_axes=(0,), parameter=name, order=order)
            tree[name] = make_weight(draw, [1], [2], [0])
    return names, tree


@given(adapter=adapters())
@examples(80)
def test_random_names_round_trip(home, adapter):
    names, tree = adapter
    params = {path: base_of(leaf) for path, leaf in tree.items()}
    save_peft(home / "names", tree, names)
    frozen, tunable = load_peft(home / "names", params, names)
    assert_same(tunable, tree)
    full = {path for path, leaf in tree.items() if not isinstance(leaf, LoraWeight)}
    assert frozen == {path: None if path in full else leaf for path, leaf in params.items()}


@given(adapter=adapters())
@examples(25)
def test_random_names_keep_their_delta_with_the_scale_folded(home, adapter):
    names, tree = adapter
    tree = {
        path: leaf
        for path, leaf in tree.items()
        if isinstance(leaf, LoraWeight) and (leaf.scale == 0 or abs(leaf.scale) > 1e-3)
    }
    assume(tree)
    names = {path: names[path] for path in tree}
    rescaled = {
        path: dataclasses.replace(leaf, b=numbers(0, leaf.b.shape, "int8") / np.float32(8))
        for path, leaf in tree.items()
    }
    params = {path: base_of(leaf) for path, leaf in tree.items()}
    save_peft(home / "folded", rescaled, names, fold_scale=True)
    _, tunable = load_peft(home / "folded", params, names)
    for path, leaf in rescaled.items():
        loaded = tunable[path]
        np.testing.assert_array_equal(loaded.a, leaf.a)
        np.testing.assert_allclose(
            np.float64(loaded.b) * loaded.scale, np.float64(leaf.b) * leaf.scale, rtol=1e-6
        )

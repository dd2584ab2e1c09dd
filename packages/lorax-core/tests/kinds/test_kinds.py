"""Every kind of adapter in every way that a model uses a weight.

A new kind is one row of `KINDS`, and is tested with every row of `USES`.
"""

import functools
import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from lorax import (
    AdaloraSpec,
    Axes,
    BdloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    LoraFASpec,
    LoraSpec,
    MaterializeError,
    MissSpec,
    OftSpec,
    TokensSpec,
    VeraSpec,
    init_lora,
    lora,
    merge_params,
    testing,
)

normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 2  # noqa: E731


def divisor_of(size):
    return next(k for k in (2, 3) if size % k == 0)


def gralora_settings(shape, axes):
    """Settings of GraLoRA whose blocks divide the weight's axes."""
    return next(
        {"rank": rank, "blocks": blocks, "split_axes": (i, o)}
        for blocks, rank in ((2, 4), (3, 3), (1, 2))
        for i in axes.inputs[::-1]
        for o in axes.outputs[::-1]
        if shape[i] % blocks == 0 and shape[o] % blocks == 0
    )


def oft_along(side):
    """OFT along the channels of a convolution, and elsewhere along the last axis of a side."""

    def spec(shape, axes):
        over = axes.inputs if side == "in" else axes.outputs
        channels = over[-1] if len(over) == 3 else None
        return OftSpec(divisor_of(shape[over[-1]]), side, channels)

    return spec


def bdlora_along(side):
    """BD-LoRA, whose factors are smaller than the weight."""

    def spec(shape, axes):
        blocks = divisor_of(shape[(axes.inputs if side == "in" else axes.outputs)[-1]])
        return BdloraSpec(blocks, alpha=4, blocks=blocks, side=side)

    return spec


# Each kind's spec, or a function that makes it for a weight's shape and axes.
KINDS = {
    "lora": LoraSpec(2, alpha=4),
    "rslora": LoraSpec(3, alpha=4, scaling="rslora"),
    "dora": DoraSpec(LoraSpec(2, alpha=4)),
    "dora-with-gradient": DoraSpec(LoraSpec(2, alpha=4), detached=False),
    "ia3": IA3Spec(),
    "ia3-in": IA3Spec("in"),
    "lora-fa": LoraFASpec(2, alpha=4),
    "dora-of-lora-fa": DoraSpec(LoraFASpec(2, alpha=4)),
    "vera": VeraSpec(3),
    "dora-of-vera": DoraSpec(VeraSpec(3)),
    "tokens": TokensSpec([2, 0]),
    "adalora": AdaloraSpec(2, alpha=4),
    "dora-of-adalora": DoraSpec(AdaloraSpec(2, alpha=4)),
    "delora": DeloraSpec(2),
    "loha": LohaSpec(2, alpha=4),
    "loha-tucker": LohaSpec(2, alpha=4, tucker=True),
    "lokr": LokrSpec(4, alpha=3),
    "lokr-narrow": LokrSpec(1, alpha=3, decompose_both=True),
    "lokr-tucker": lambda shape, axes: LokrSpec(
        1, alpha=3, factor=1, tucker=True, split_axes=(axes.inputs[-1], axes.outputs[-1])
    ),
    "locon": LoconSpec(2, alpha=4),
    "miss": lambda shape, axes: MissSpec(divisor_of(shape[axes.inputs[-1]])),
    "miss-remainder": lambda shape, axes: MissSpec(shape[axes.inputs[-1]] - 1),
    "gralora": lambda shape, axes: GraloraSpec(alpha=4, **gralora_settings(shape, axes)),  # pyright: ignore
    "bdlora": bdlora_along("in"),
    "bdlora-out": bdlora_along("out"),
    "oft": oft_along("in"),
    "oft-out": oft_along("out"),
    "oft-bound": lambda shape, axes: OftSpec(divisor_of(shape[axes.inputs[-1]]), eps=0.3),
}

# (kind, use) pairs that cannot stay factored: the weight is materialized, with a warning.
MATERIALIZED = {
    # A gain that varies along the window.
    ("ia3-in", "convolution"),
    ("ia3-in", "grouped-convolution"),
    # Half of an axis with three blocks: the cut is inside a block.
    ("gralora", "split"),
    ("oft-out", "split"),
    # Likewise for groups.
    ("oft-out", "grouped-convolution"),
    # A looked-up row depends on all rows of its block.
    ("oft", "lookup"),
    ("oft", "tied"),
}

# (kind, use) pairs whose weight the spec rejects.
REJECTED = {
    # Rows are counted along one input axis.
    ("tokens", "merged-heads"),
    ("tokens", "convolution"),
    ("tokens", "grouped-convolution"),
}


def conv(params, x, **keywords):
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **keywords
    )


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def rematerialized(params, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(layer, x, params["w"])[0]


def masked(params, x):
    return x @ (params["w"] * jnp.arange(1.0, 10.0)[:, None]) / 3


def in_a_branch(params, x):
    return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ (2 * w), params["w"])


def looped(params, x):
    return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ params["w"]), x)


def split(params, x):
    return jnp.concatenate([jnp.tanh(x @ w) for w in jnp.split(params["w"], 2, 1)][::-1], 1)


def split_inputs(params, x):
    return sum(jnp.tanh(x[:, :4] @ w) for w in jnp.split(params["w"], 2, 0))


def in_bfloat16(params, x):
    return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)


AXES = Axes((), (0,), (1,))
STACK = Axes((0,), (1,), (2,))
# (function, shape of the weight, its axes, shapes of arguments or arrays, keywords of `check`)
USES = {
    "right": (lambda p, x: x @ p["w"], (9, 6), AXES, [(3, 9)]),
    "left": (lambda p, x: p["w"] @ x, (6, 9), Axes((), (1,), (0,)), [(9, 3)]),
    "heads": (
        lambda p, x: jnp.einsum("bk,hdk->bhd", x, p["w"]),
        (4, 3, 9),
        Axes((), (2,), (0, 1)),
        [(2, 9)],
    ),
    "merged-heads": (
        lambda p, x: jnp.einsum("bhd,hdk->bk", x, p["w"]),
        (4, 3, 8),
        Axes((), (0, 1), (2,)),
        [(2, 4, 3)],
    ),
    "reshaped": (
        lambda p, x: x @ p["w"].reshape(9, 8),
        (9, 4, 2),
        Axes((), (0,), (1, 2)),
        [(3, 9)],
    ),
    "transposed": (lambda p, x: x @ p["w"].T, (6, 9), Axes((), (1,), (0,)), [(3, 9)]),
    "batched-last": (
        lambda p, x: jnp.einsum("ebi,ioe->ebo", x, p["w"]),
        (9, 6, 3),
        Axes((2,), (0,), (1,)),
        [(3, 2, 9)],
    ),
    "batched": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (3, 9, 6), STACK, [(3, 2, 9)]),
    "one-expert": (lambda p, x, i: x @ p["w"][i], (3, 9, 6), STACK, [(2, 9), np.int32(2)]),
    "expert-for-each-example": (
        lambda p, x, i: jnp.einsum("bi,bio->bo", x, p["w"][i]),
        (3, 9, 6),
        STACK,
        [(2, 9), np.array([2, 0])],
    ),
    "ragged": (
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        (3, 9, 6),
        STACK,
        [(6, 9), np.array([2, 0, 4], np.int32)],
    ),
    "vmapped": (
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x),
        (3, 9, 6),
        STACK,
        [(3, 2, 9)],
    ),
    "scan": (scanned, (4, 8, 8), STACK, [(3, 8)]),
    "scan-and-remat": (rematerialized, (4, 8, 8), STACK, [(3, 8)]),
    "loop": (looped, (8, 8), AXES, [(3, 8)]),
    "jit": (lambda p, x: jax.jit(lambda w: x @ w)(p["w"]), (9, 6), AXES, [(3, 9)]),
    "branch": (in_a_branch, (9, 6), AXES, [(3, 9)]),
    "lookup": (lambda p, i: p["w"][i], (9, 6), AXES, [np.array([3, 1, 0, 8])]),
    "tied": (lambda p, i: p["w"][i] @ p["w"].T, (9, 6), AXES, [np.array([3, 1, 0, 8])]),
    "split": (split, (9, 6), AXES, [(3, 9)]),
    "split-inputs": (split_inputs, (8, 6), AXES, [(3, 8)]),
    "row-gain": (masked, (9, 6), AXES, [(3, 9)]),
    "convolution": (conv, (3, 2, 4, 6), Axes((), (0, 1, 2), (3,)), [(2, 5, 5, 4)]),
    "grouped-convolution": (
        functools.partial(conv, feature_group_count=2),
        (3, 2, 4, 6),
        Axes((), (0, 1, 2), (3,)),
        [(2, 5, 5, 8)],
    ),
    "bfloat16": (in_bfloat16, (9, 6), AXES, [(3, 9)]),
}


# Variants that differ from another kind in one setting are tested with the uses that it affects.
USES_OF_VARIANTS = {
    "oft-out": (
        "right", "merged-heads", "ragged", "scan-and-remat", "tied", "split", "row-gain",
        "convolution", "grouped-convolution",
    ),
    "loha-tucker": ("merged-heads", "convolution", "grouped-convolution"),
    "lokr-tucker": ("merged-heads", "convolution", "grouped-convolution"),
    "oft-bound": ("right", "batched", "scan-and-remat"),
    "bdlora-out": ("right", "ragged", "scan-and-remat", "tied", "grouped-convolution"),
}  # fmt: skip

# One use for each rule that does more than move a weight. One CI job runs all combinations.
SAMPLE = ("right", "merged-heads", "one-expert", "ragged", "scan-and-remat", "tied", "convolution")


def sampled(kind, use):
    return pytest.param(kind, use, marks=() if use in SAMPLE else pytest.mark.full_product)


def uses_of(kind):
    return [use for use in USES if kind not in USES_OF_VARIANTS or use in USES_OF_VARIANTS[kind]]


def case_of(use, kind):
    function, shape, axes, args = USES[use]
    made = KINDS[kind]
    made = made if isinstance(made, lorax.AdapterSpec) else made(shape, axes)
    spec = {"w": made.with_axes(axes)}
    args = [normal(k, *arg) if isinstance(arg, tuple) else arg for k, arg in enumerate(args)]
    return function, {"w": normal(7, *shape)}, spec, [jnp.asarray(arg) for arg in args]


@pytest.mark.parametrize(
    ("kind", "use"), [sampled(kind, use) for kind in KINDS for use in uses_of(kind)]
)
def test_equals_the_merged_model_without_materializing(request, kind, use):
    function, params, spec, args = case_of(use, kind)
    if (kind, use) in REJECTED:
        with pytest.raises(lorax.SpecError, match="^`w` has "):
            testing.check(function, params, spec, *args)
        return
    # JAX has no batching rule for every way of mapping `ragged_dot`.
    mapped = use in SAMPLE and use != "ragged" and kind not in USES_OF_VARIANTS
    testing.check(
        function, params, spec, *args,
        transforms=mapped and not request.config.getoption("--without-transforms"),
        materializes=(kind, use) in MATERIALIZED,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "use"),
    [sampled(kind, use) for kind in KINDS for use in uses_of(kind) if (kind, use) not in REJECTED],
)
def test_initial_outputs_are_those_of_the_base(kind, use):
    function, params, spec, args = case_of(use, kind)
    pair = init_lora(params, spec, jax.random.key(0))
    adapted = lora(function, on_materialize="allow")
    got, expected = adapted(pair, *args), function(params, *args)
    # XLA compiles the body of a loop separately, and rounds differently.
    is_fused = use in ("scan", "scan-and-remat", "loop")
    # (x ⊙ g) @ W and x @ (g ⊙ W) differ by rounding.
    is_reordered = (kind, use) == ("oft", "row-gain")
    if kind.startswith("dora") or is_fused or is_reordered:
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)  # pyright: ignore
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_round_trip(kind):
    _, params, spec, _ = case_of("batched", kind)
    weight = init_lora(params, spec, jax.random.key(0)).tunable["w"]
    restored = lorax.adapter_from_settings(json.loads(json.dumps(weight.settings())))
    restored = restored.with_factors(weight.factors())
    assert jax.tree.structure(restored) == jax.tree.structure(weight)
    layout = restored.layout((3, 9, 6))
    assert layout.shapes() == {name: x.shape for name, x in weight.factors().items()}
    assert spec["w"].count((3, 9, 6), STACK) == lorax.count_params(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    pytest.importorskip("flatbuffers")
    function, params, spec, args = case_of("right", kind)
    pair = init_lora(params, spec, jax.random.key(0))
    data = jax.export.export(jax.jit(lora(function)))(pair, *args).serialize()
    exported = jax.export.deserialize(bytearray(data))
    np.testing.assert_allclose(exported.call(pair, *args), lora(function)(pair, *args), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_reports_coverage(kind):
    function, params, spec, args = case_of("right", kind)
    pair = init_lora(params, spec, jax.random.key(0))
    (row,) = lorax.explain(function, pair, *args).rows
    assert row.status == "covered" and row.uses == ("dot_general",)
    assert row.trainable == lorax.count_params(pair.tunable)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_restores_the_base_or_raises(kind):
    _, params, spec, _ = case_of("right", kind)
    frozen, tunable = init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    merged = merge_params(frozen, tunable)
    if tunable["w"].layout((9, 6)).frozen:
        with pytest.raises(
            lorax.PairError, match=r"at `w` has frozen factors.*Keep the frozen tree"
        ):
            lorax.unmerge(merged, tunable)
    else:
        restored = lorax.unmerge(merged, tunable)["w"]
        np.testing.assert_allclose(restored, params["w"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_shape(kind):
    function, params, spec, args = case_of("right", kind)
    shapes = jax.eval_shape(lambda p: init_lora(p, spec, jax.random.key(0)), params)
    assert jax.eval_shape(lora(function), shapes, *args).shape == (3, 6)


def test_gain_that_varies_along_the_window_materializes():
    function, params, spec, args = case_of("convolution", "ia3-in")
    pair = init_lora(params, spec, jax.random.key(0))
    with pytest.raises(MaterializeError, match="where its gain cannot be applied"):
        lora(function, on_materialize="error")(pair, *args)
    spec = {"w": IA3Spec("in", gain_axes=[-2])}
    testing.check(function, params, spec, *args, transforms=False)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_settings_raise(kind):
    _, params, spec, _ = case_of("right", kind)
    settings = init_lora(params, spec, jax.random.key(0)).tunable["w"].settings()
    inner = settings.get("delta", settings)
    for name in {"rank", "blocks"} & inner.keys():
        with pytest.raises(ValueError, match=name):
            lorax.adapter_from_settings(settings | {"delta": inner | {name: 0}} if "delta" in
                                        settings else settings | {name: 0})  # fmt: skip
    with pytest.raises(ValueError, match="no setting 'more'"):
        lorax.adapter_from_settings(settings | {"more": 1})


@pytest.mark.parametrize("kind", ["gralora", "lokr", "oft"])
def test_base_that_blocks_do_not_divide_raises(kind):
    function, params, spec, _ = case_of("right", kind)
    tunable = init_lora(params, spec, jax.random.key(0)).tunable
    with pytest.raises(lorax.PairError, match="the adapter at `w` has .* do not fit a base"):
        lora(function)(({"w": normal(0, 10, 6)}, tunable), normal(1, 3, 10))

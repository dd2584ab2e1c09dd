"""Kinds that cut axes into blocks: formulas, initial factors, invalid input, and the oracle."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    Axes,
    BdloraSpec,
    DoraSpec,
    GraloraSpec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    MissSpec,
    SpecError,
    _transform,
    init_lora,
    lora,
    materialize,
    testing,
)
from lorax._registry import RULES

SPECS = {
    "LohaSpec": LohaSpec(2),
    "LokrSpec": LokrSpec(2),
    "LoconSpec": LoconSpec(2),
    "MissSpec": MissSpec(2),
    "GraloraSpec": GraloraSpec(2),
    "BdloraSpec": BdloraSpec(2),
}


def delta_of(spec, shape, seed=1):
    """The delta of random factors, and the adapter that holds them."""
    base = jnp.zeros(shape)
    _, tunable = init_lora({"w": base}, {"w": spec}, jax.random.key(0))
    weight = testing.random_factors(tunable, jax.random.key(seed))["w"]
    return materialize(base, weight), weight


# Formulas, in NumPy.


def test_loha_is_a_product_of_two_low_rank_matrices():
    delta, w = delta_of(LohaSpec(2, alpha=5), (7, 6))
    np.testing.assert_allclose(delta, 2.5 * (w.a1 @ w.b1) * (w.a2 @ w.b2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_lokr_is_a_kronecker_product(rank, both):
    delta, w = delta_of(LokrSpec(rank, alpha=5, factor=2, decompose_both=both), (10, 8))
    assert w.blocks == (2, 2) and w.narrow == (False, rank == 1)
    w2 = w.a2 @ w.b2 if rank == 1 else w.w2
    np.testing.assert_allclose(delta, 5 / rank * np.kron(w.w1, w2), rtol=1e-5, atol=1e-6)


def test_both_matrices_of_lokr_may_be_low_rank():
    delta, w = delta_of(LokrSpec(1, alpha=5, decompose_both=True), (12, 9))
    assert w.narrow == (True, True) and w.factors().keys() == {"a1", "b1", "a2", "b2"}
    expected = 5 * np.kron(w.a1 @ w.b1, w.a2 @ w.b2)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, blocks", [(36, 6), (128, 8), (127, 1), (12, 3), (1, 1)])
def test_lokr_blocks_are_as_nearly_square_as_possible(size, blocks):
    weight = LokrSpec(1).blank((size, 4), Axes((), (0,), (1,)))
    assert weight.blocks == (blocks, 2)


def test_the_window_of_lokr_is_in_the_second_matrix():
    # [in, out, window]
    spec = LokrSpec(9, factor=2, split_axes=[0, 1], in_axes=[0, 2], out_axes=[1])
    delta, w = delta_of(spec, (6, 4, 3))
    expected = jnp.einsum("ml,nwk->mnlkw", w.w1, w.w2).reshape(6, 4, 3)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)


def test_locon_is_two_products_around_a_core():
    delta, w = delta_of(LoconSpec(2, alpha=5), (3, 2, 7, 6))
    expected = 2.5 * jnp.einsum("ir,hwrq,qo->hwio", w.a, w.core, w.b)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)


def test_locon_channels_may_be_first():
    spec = LoconSpec(2, channel_axis=0, in_axes=[0, 1], out_axes=[2])
    delta, w = delta_of(spec, (7, 3, 6))
    expected = jnp.einsum("ir,wrq,qo->iwo", w.a, w.core, w.b)
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 4, 8])
def test_miss_repeats_its_rows(rank):
    delta, w = delta_of(MissSpec(rank), (8, 6))
    np.testing.assert_array_equal(delta, w.d[np.arange(8) % rank])


def test_gralora_is_a_grid_of_low_rank_blocks():
    delta, w = delta_of(GraloraSpec(4, alpha=5, blocks=2), (6, 10))
    assert w.a.shape == (2, 3, 2, 2) and w.b.shape == (2, 2, 2, 5)
    for n in range(2):
        for m in range(2):
            block = delta[3 * n : 3 * n + 3, 5 * m : 5 * m + 5]
            expected = 1.25 * w.a[n, :, m] @ w.b[m, n]
            np.testing.assert_allclose(block, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["in", "out"])
def test_one_factor_of_bdlora_is_block_diagonal(side):
    delta, w = delta_of(BdloraSpec(4, alpha=5, blocks=2, side=side), (6, 10))
    a, b = np.zeros((6, 4)), np.zeros((4, 10))
    for n in range(2):
        rank = slice(2 * n, 2 * n + 2)
        if side == "in":
            a[3 * n : 3 * n + 3, rank], b[rank] = w.a[n], w.b[n]
        else:
            a[:, rank], b[rank, 5 * n : 5 * n + 5] = w.a[:, n], w.b[n]
    np.testing.assert_allclose(delta, 1.25 * a @ b, rtol=1e-5, atol=1e-6)


# Initial factors.

ZERO = {"LohaSpec": "a2", "LokrSpec": "w1", "LoconSpec": "b", "MissSpec": "d", "GraloraSpec": "b"}
ZERO["BdloraSpec"] = "b"


@pytest.mark.parametrize("name", SPECS)
def test_one_initial_factor_is_zero_and_the_others_are_within_bounds(name):
    _, tunable = init_lora({"w": jnp.ones((64, 36))}, {"w": SPECS[name]}, jax.random.key(0))
    factors = tunable["w"].factors()
    assert not factors.pop(ZERO[name]).any()
    # The fan-in of each is the number of entries that it sums over.
    fan_in = {
        "LohaSpec": {"a1": 64, "b1": 2, "b2": 2},
        "LokrSpec": {"a2": 8, "b2": 2},
        "LoconSpec": {"a": 64, "core": 2},
        "MissSpec": {},
        "GraloraSpec": {"a": 32},
        "BdloraSpec": {"a": 32},
    }[name]
    assert factors.keys() == fan_in.keys()
    for key, factor in factors.items():
        bound = 1 / math.sqrt(fan_in[key])
        largest = jnp.abs(factor).max()
        assert 0.5 * bound < largest <= bound, key


@pytest.mark.parametrize("name", SPECS)
def test_entries_of_a_stack_have_different_initial_factors(name):
    spec = SPECS[name].with_axes(Axes((0,), (1,), (2,)))
    _, tunable = init_lora(
        {"w": jnp.ones((3, 8, 6))}, {"w": spec}, jax.random.key(0), b_init="gaussian"
    )
    for key, factor in tunable["w"].factors().items():
        assert not jnp.allclose(factor[0], factor[1]), key


def test_blocks_have_different_initial_factors():
    for spec in (GraloraSpec(4), BdloraSpec(4)):
        _, tunable = init_lora({"w": jnp.ones((8, 6))}, {"w": spec}, jax.random.key(0))
        assert not jnp.allclose(tunable["w"].a[0], tunable["w"].a[1])


# Invalid input.

BAD = {
    "rank of LoHa": (LohaSpec(0), "`w` has a LohaSpec of rank 0"),
    "scale of LoHa": (LohaSpec(2, alpha=math.inf), "`w` has alpha inf"),
    "rank of LoKr": (LokrSpec(2.0), "`w` has rank 2.0"),  # pyright: ignore
    "scale of LoKr": (LokrSpec(2, alpha="1"), "`w` has alpha '1'"),  # pyright: ignore
    "factor": (LokrSpec(2, factor=0), "`w` has factor 0; it must be a positive int, or -1"),
    "factor that does not divide": (
        LokrSpec(2, factor=4),
        r"`w` .*factor=4, which does not divide axis 1 of its shape \(8, 6\).*3 is nearest.*or -1",
    ),
    "axes to split": (LokrSpec(2, split_axes=[0]), r"`w` .*split_axes=\(0,\); give one of its"),
    "axes that are not": (GraloraSpec(2, split_axes=[0, 5]), "`w` has 2 axes; split_axes"),
    "rank of LoCon": (LoconSpec(-3), "`w` has a LoconSpec of rank -3"),
    "channels": (
        LoconSpec(2, channel_axis=1),
        "`w` .*channel_axis=1; it must be one of the input axes",
    ),
    "rank of MiSS": (MissSpec(0), "`w` has a MissSpec of rank 0"),
    "more rows than inputs": (
        MissSpec(9),
        "`w` .*rank 9, .*axis 0 has size 8. Choose a rank up to",
    ),
    "rank of GraLoRA": (GraloraSpec(0), "`w` has a GraloraSpec of rank 0"),
    "rank of BD-LoRA": (
        BdloraSpec(3),
        "`w` .*blocks=2, which does not divide its rank, 3. Choose a number",
    ),
    "blocks of BD-LoRA": (BdloraSpec(3, blocks=3), "`w` .*does not divide its axis 0, "),
    "side of BD-LoRA": (BdloraSpec(2, side="b"), "of side 'b'"),  # pyright: ignore
    "axis of BD-LoRA": (BdloraSpec(2, split_axis=1), r"split_axis=1, but the axes of side 'in'"),
    "blocks": (GraloraSpec(2, blocks=0), "`w` has a GraloraSpec of number of blocks 0"),
    "blocks and rank": (
        GraloraSpec(3, blocks=2),
        "`w` .*does not divide its rank, 3. Choose a number",
    ),
    "blocks and inputs": (GraloraSpec(3, blocks=3), "`w` .*does not divide axis 0 of its shape"),
    "blocks and outputs": (GraloraSpec(4, blocks=4), "`w` .*does not divide axis 1 of its shape"),
    **{
        f"DoRA of {name}": (DoraSpec(spec), f"`w` has a DoraSpec of a {name}")
        for name, spec in SPECS.items()
    },
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_spec_raises_with_its_path(case):
    spec, message = BAD[case]
    with pytest.raises(SpecError, match=message):
        init_lora({"w": jnp.ones((8, 6))}, {"w": spec}, jax.random.key(0))


def test_splitting_a_shared_axis_raises():
    spec = LokrSpec(2, shared_axes=[0], split_axes=[0, 1])
    with pytest.raises(SpecError, match=r"`w` .*of which one is shared"):
        init_lora({"w": jnp.ones((4, 8, 6))}, {"w": spec}, jax.random.key(0))


# The oracle, for kinds with a factor that has both input and output axes.


def merged_weight(eqn, x, w, **_):
    eqn.use(w, "product")
    return eqn(x, w.array())


def delta_alone(eqn, x, w, **_):
    """`x W + x Δ`: materializes the delta, but not the merged weight."""
    eqn.use(w, "product")
    (term,) = w.terms
    return eqn(x, w.base) + eqn(x, term.array(x.dtype))


def delta_before_reshape(eqn, x, w, **_):
    """`x W + x Δ`, with Δ materialized in the shape that its blocks have before a reshape."""
    eqn.use(w, "product")
    (term,) = w.terms
    unmerged = tuple((label,) for label in term.shown)
    delta = term.__class__(term.factors, term.labels, unmerged).array(x.dtype)
    x_parts = x.reshape(x.shape[0], *(label.size for label in term.out[0]))
    summed = len(term.out[0])
    product = jnp.tensordot(x_parts, delta, summed)
    return eqn(x, w.base) + product.reshape(x.shape[0], -1)


@pytest.mark.parametrize("rule", [merged_weight, delta_alone, delta_before_reshape])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("spec", [LokrSpec(9), MissSpec(2), GraloraSpec(2)], ids=str)
def test_oracle_catches_a_materialized_delta(monkeypatch, spec, stacked, rule):
    (primitive,) = [p for p in RULES if p.name == "dot_general"]
    params, x = {"w": jnp.ones((8, 6)) / 3}, jnp.ones((3, 8))

    def model(params, x):
        return jax.lax.scan(lambda y, w: (y + x @ w, None), 0 * x[:, :6], params["w"])[0]

    function = model if stacked else lambda params, x: x @ params["w"]
    if stacked:
        params = {"w": jnp.stack([params["w"]] * 5)}
        spec = spec.with_axes(Axes((0,), (1,), (2,)))
    frozen, tunable = init_lora(params, {"w": spec}, jax.random.key(0))
    assert not testing.weight_sized(function, frozen, tunable, x)
    monkeypatch.setattr(_transform, "RULES", {**RULES, primitive: rule})
    assert testing.weight_sized(function, frozen, tunable, x)
    with pytest.raises(AssertionError, match="adapted weights are materialized"):
        testing.check(function, params, {"w": spec}, x)


def test_miss_remainder_is_not_weight_sized():
    # The row that an input multiplies depends on data, which the oracle does not follow.
    params, x = {"w": jnp.ones((11, 7))}, jnp.ones((3, 11))
    pair = init_lora(params, {"w": MissSpec(4)}, jax.random.key(0))
    program = str(jax.make_jaxpr(lora(lambda p, x: x @ p["w"]))(pair, x))
    assert program.count("[11,4]") >= 1 and program.count("[11,7]") == 1  # the base itself


# Edge cases of rules: lookups out of range, groups that cut a block, strides and dilations.


@pytest.mark.parametrize("spec", [LokrSpec(9), MissSpec(2), GraloraSpec(2), BdloraSpec(2)], ids=str)
@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_look_up_out_of_range(spec, mode):
    def model(params, i):
        return jnp.take(params["w"], i, axis=0, mode=mode, fill_value=0)

    indices = jnp.array([[3, -1], [8, 7], [-9, 40]])
    testing.check(model, {"w": jnp.ones((8, 6)) / 3}, {"w": spec}, indices)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16])
def test_look_up_by_small_integers(dtype):
    def model(params, i):
        return params["w"][i]

    indices = jnp.array([3, 0, 120], dtype)
    testing.check(model, {"w": jnp.ones((400, 6)) / 3}, {"w": MissSpec(200)}, indices)


OPTIONS = {
    "strides": dict(window_strides=(2, 1)),
    "padding": dict(padding=((2, 0), (1, 3))),
    "dilated input": dict(lhs_dilation=(2, 3), padding=((0, 0), (1, 0))),
    "dilated window": dict(rhs_dilation=(2, 1)),
    "two groups": dict(feature_group_count=2),
    "four groups": dict(feature_group_count=4),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "HWCN"])
@pytest.mark.parametrize("kind", ["LokrSpec", "LoconSpec", "MissSpec", "GraloraSpec", "BdloraSpec"])
def test_convolution_options(kind, layout, options):
    keywords = {"window_strides": (1, 1), "padding": "VALID"} | OPTIONS[options]
    groups = keywords.get("feature_group_count", 1)

    def model(params, x):
        numbers = (layout, "HWIO", layout[::-1] if layout == "HWCN" else layout)
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **keywords)  # pyright: ignore

    sizes = {"N": 2, "H": 7, "W": 6, "C": 4 * groups}
    x = jax.random.normal(jax.random.key(0), [sizes[d] for d in layout])  # pyright: ignore
    spec = {"LokrSpec": LokrSpec(9), "GraloraSpec": GraloraSpec(4)}.get(kind, SPECS[kind])
    testing.check(model, {"w": jnp.ones((3, 2, 4, 8)) / 9}, {"w": spec}, x, transforms=False)


def test_convolution_kernels_under_vmap():
    def model(params, x):
        def one(kernel, x):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")

        return jax.vmap(one)(params["w"], x)

    # [kernel, out, in, height, width]
    spec = LokrSpec(9, in_axes=[2, 3, 4], out_axes=[1], shared_axes=[0], split_axes=[1, 2])
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 5, 5))
    testing.check(model, {"w": jnp.ones((3, 6, 4, 3, 2)) / 9}, {"w": spec}, x, transforms=False)

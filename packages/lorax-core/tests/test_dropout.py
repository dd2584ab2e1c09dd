"""Dropout on the input of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    LORA_FULL,
    Axes,
    DoraSpec,
    IA3Spec,
    LoraSpec,
    PairError,
    explain,
    init_lora,
    lora,
    merge_params,
    testing,
    with_dropout,
)

KEY = jax.random.key(3)
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731


def dense(params, x):
    return x @ params["w"]


def pair_of(params, spec=None):
    frozen, tunable = init_lora(params, spec or {"w": 2}, jax.random.key(0))
    return frozen, testing.random_factors(tunable, jax.random.key(1))


def masks_of(function, frozen, tunable, x, key=KEY, rate=0.5):
    """The entries that dropout keeps: the base is zero, and the delta is the identity."""
    return np.asarray(lora(function)((frozen, with_dropout(tunable, key, rate)), x)) != 0


def pair_with_identity_delta(*shape):
    """A pair whose delta is the identity, for every entry of the leading axes."""
    *shared, n, _ = shape
    spec = LoraSpec(n, shared_axes=range(len(shared)))
    frozen, tunable = init_lora({"w": jnp.zeros(shape)}, {"w": spec}, jax.random.key(0))
    eye = jnp.broadcast_to(jnp.eye(n), shape)
    return frozen, {"w": tunable["w"].with_factors({"a": eye, "b": eye})}


def test_expectation_and_variance():
    frozen, tunable = pair_with_identity_delta(64, 64)
    x, rate = jnp.ones((500, 64)), 0.3
    out = lora(dense)((frozen, with_dropout(tunable, KEY, rate)), x)
    kept = np.asarray(out != 0)
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / out.size)
    np.testing.assert_allclose(out[kept], 1 / 0.7, rtol=1e-4)
    assert abs(out.mean() - 1) < 4 * np.sqrt(0.3 / 0.7 / out.size)
    # Neither whole rows nor whole columns are dropped.
    assert kept.mean(0).std() < 0.05 and kept.mean(1).std() < 0.1


def test_masks_are_independent():
    """An entry is independent of its neighbors along each axis, and of other keys."""
    x, rate = jnp.ones((6, 512, 64)), 0.25
    frozen, tunable = pair_with_identity_delta(64, 64)
    kept = np.stack(
        [masks_of(dense, frozen, tunable, x, jax.random.key(k), rate) for k in range(4)]
    )
    centered = kept - (1 - rate)

    def is_small(products):
        return abs(products.mean()) < 4.5 * products.std() / np.sqrt(products.size)

    assert is_small(centered)
    for axis in range(4):
        for lag in (1, 2, 4, 32):
            if lag < centered.shape[axis]:
                assert is_small(centered * np.roll(centered, lag, axis)), (axis, lag)
        counts = kept.sum(axis)
        expected = kept.shape[axis] * rate * (1 - rate)
        assert abs(counts.var() / expected - 1) < 0.15, axis


def test_dropout_does_not_apply_to_the_base():
    params = {"w": normal(0, 5, 3)}
    frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))  # b is zero
    out = lora(dense)((frozen, with_dropout(tunable, KEY, 0.9)), normal(1, 4, 5))
    np.testing.assert_array_equal(out, dense(params, normal(1, 4, 5)))


def test_equal_keys_give_equal_masks():
    frozen, tunable = pair_of({"w": normal(0, 50, 3)})
    run = lambda key: lora(dense)((frozen, with_dropout(tunable, key, 0.5)), normal(1, 4, 50))  # noqa: E731
    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert not np.allclose(run(KEY), run(jax.random.key(4)))
    np.testing.assert_allclose(jax.jit(run)(KEY), run(KEY), rtol=1e-5)
    np.testing.assert_array_equal(run(jax.random.PRNGKey(3)), run(jax.random.key(3)))


def test_a_rate_of_zero_returns_the_tree():
    _, tunable = pair_of({"w": normal(0, 5, 3)})
    assert with_dropout(tunable, KEY, 0) is tunable


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "0.1", True])
def test_invalid_rate_raises(rate):
    with pytest.raises(ValueError, match="the rate is"):
        with_dropout({}, KEY, rate)


def test_invalid_tree_or_key_raises():
    frozen, tunable = pair_of({"w": normal(0, 5, 4)})
    with pytest.raises(PairError, match="the tree has no adapter"):
        with_dropout(frozen, KEY, 0.1)
    with_once = with_dropout(tunable, KEY, 0.1)
    with pytest.raises(PairError, match="the adapter at `w` has dropout already"):
        with_dropout(with_once, KEY, 0.1)
    for key in (0, None, jax.random.split(KEY)):
        with pytest.raises(TypeError, match="with_dropout takes one PRNG key"):
            with_dropout(tunable, key, 0.1)  # pyright: ignore[reportArgumentType]


def test_each_weight_has_its_own_mask():
    frozen, tunable = pair_with_identity_delta(64, 64)
    frozen, tunable = ({"one": tree["w"], "two": tree["w"]} for tree in (frozen, tunable))
    masks = masks_of(
        lambda p, x: jnp.stack([x @ p["one"], x @ p["two"]]), frozen, tunable, jnp.ones((4, 64))
    )
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


def twice(function):
    return lambda p, x: jnp.stack([function(p["w"], x), function(p["w"], x)])


TWO_USES = {
    "products": twice(lambda w, x: x @ w),
    "jit": twice(jax.jit(lambda w, x: x @ w)),
    "product-and-jit": lambda p, x: jnp.stack([x @ p["w"], jax.jit(lambda w: x @ w)(p["w"])]),
    "within-jit": lambda p, x: jax.jit(lambda w: jnp.stack([x @ w, x @ w]))(p["w"]),
    "steps-of-a-scan": lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 2)[1],
    "remat": twice(jax.checkpoint(lambda w, x: x @ w)),
    "branches": twice(lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w)),
    "left": lambda p, x: jnp.stack([x @ p["w"], (p["w"].T @ x.T).T]),
}


@pytest.mark.parametrize("name", TWO_USES)
def test_each_use_has_its_own_mask(name):
    masks = masks_of(TWO_USES[name], *pair_with_identity_delta(64, 64), jnp.ones((4, 64)))
    assert 0.4 < masks.mean() < 0.6
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


STACKED = {
    "scan": lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
    "scan-and-remat": lambda p, x: lax.scan(
        jax.checkpoint(lambda c, w: (c, x @ w)), 0, p["w"])[1],
    "index": lambda p, x: jnp.stack([x @ p["w"][i] for i in range(2)]),
    "batched": lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x]), p["w"]),
    "vmap": lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], jnp.stack([x, x])),
    "unstacked": lambda p, x: jnp.stack([x @ w for w in p["w"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_each_entry_of_a_stack_has_its_own_mask(name):
    masks = masks_of(STACKED[name], *pair_with_identity_delta(2, 64, 64), jnp.ones((4, 64)))
    assert masks.shape == (2, 4, 64) and 0.4 < masks.mean() < 0.6
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


def test_experts_that_share_an_input_share_a_mask():
    """An array has one mask: `x` has no axis for the experts."""
    masks = masks_of(
        lambda p, x: jnp.einsum("bi,eio->ebo", x, p["w"]),
        *pair_with_identity_delta(2, 64, 64),
        jnp.ones((4, 64)),
    )
    assert 0.4 < masks.mean() < 0.6 and (masks[0] == masks[1]).all()


def test_ragged_dot_drops_entries():
    masks = masks_of(
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 3])),
        *pair_with_identity_delta(2, 64, 64),
        jnp.ones((4, 64)),
    )  # fmt: skip
    assert 0.4 < masks.mean() < 0.6


def test_a_convolution_drops_entries_of_its_input():
    params = {"w": jnp.zeros((1, 1, 16, 16))}
    spec = {"w": LoraSpec(16, in_axes=(0, 1, 2))}
    frozen, tunable = init_lora(params, spec, jax.random.key(0))
    eye = jnp.eye(16)
    tunable = {"w": tunable["w"].with_factors({"a": eye.reshape(1, 1, 16, 16), "b": eye})}
    conv = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    masks = masks_of(conv, frozen, tunable, jnp.ones((2, 8, 8, 16)))
    assert 0.45 < masks.mean() < 0.55


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_gradient_uses_the_mask_of_the_value(wrap):
    """Under remat the mask is drawn again, and is the same. Compared with a finite difference."""
    frozen, tunable = pair_of({"w": normal(0, 4, 6, 6)}, {"w": LoraSpec(2, shared_axes=[0])})
    layer = wrap(lambda x, w: (jnp.tanh(x @ w), None))

    def loss(tunable):
        model = lora(lambda params, x: lax.scan(layer, x, params["w"])[0])
        return model((frozen, with_dropout(tunable, KEY, 0.5)), normal(1, 3, 6)).sum()

    gradient = jax.grad(loss)(tunable)
    direction = testing.random_factors(tunable, jax.random.key(5))
    ahead, behind = (
        loss(jax.tree.map(lambda t, m, s=s: t + s * m, tunable, direction)) for s in (5e-3, -5e-3)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, m: (g * m).sum(), gradient, direction)))
    np.testing.assert_allclose((ahead - behind) / 1e-2, slope, rtol=1e-2)


def test_every_kind_takes_dropout():
    params = {"dora": normal(0, 8, 5), "ia3": normal(1, 5, 5), "full": normal(2, 5)}
    spec = {"dora": DoraSpec(LoraSpec(2)), "ia3": IA3Spec(), "full": LORA_FULL}
    frozen, tunable = pair_of(params, spec)
    model = lambda p, x: x @ p["dora"] @ p["ia3"] + p["full"][None]  # noqa: E731
    x = normal(3, 4, 8)
    plain = lora(model)((frozen, tunable), x)
    dropped = with_dropout(tunable, KEY, 0.5)
    assert not np.allclose(lora(model)((frozen, dropped), x), plain)
    assert [row.status for row in explain(model, (frozen, dropped), x).rows] == [
        "covered", "full", "covered",
    ]  # fmt: skip
    # Merging ignores dropout.
    merged, expected = (merge_params(frozen, tree) for tree in (dropped, tunable))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_vmap_over_adapters_and_data():
    frozen, tunable = pair_of({"w": normal(0, 16, 6)})
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), tunable)
    x = normal(1, 2, 3, 16)
    run = lambda t, x, key: lora(dense)((frozen, with_dropout(t, key, 0.5)), x)  # noqa: E731
    keys = jax.random.split(KEY, 2)
    got = jax.vmap(run)(several, x, keys)
    for k in range(2):
        alone = run(jax.tree.map(lambda leaf, k=k: leaf[k], several), x[k], keys[k])
        np.testing.assert_allclose(got[k], alone, rtol=1e-4, atol=1e-5)


def test_materialized_weight_loses_dropout_and_warns():
    frozen, tunable = pair_of({"w": normal(0, 5, 5)})
    with pytest.warns(UserWarning, match="`tanh` .* is not linear in the weight"):
        lora(lambda p, x: x @ jnp.tanh(p["w"]))(
            (frozen, with_dropout(tunable, KEY, 0.5)), normal(1, 3, 5)
        )
    with pytest.warns(UserWarning, match="has no rule for a weight with a gain or dropout"):
        lora(lambda p, x: x @ (p["w"] + 1))(
            (frozen, with_dropout(tunable, KEY, 0.5)), normal(1, 3, 5)
        )


@pytest.mark.devices(4)
def test_each_shard_has_its_own_mask():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    frozen, tunable = pair_with_identity_delta(64, 64)

    def model(params, x):
        run = jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec),
            out_specs=spec,
        )  # fmt: skip
        return run(params["w"], x)

    masks = masks_of(model, frozen, tunable, jnp.ones((8, 64))).reshape(4, 2, 64)
    for one, other in zip(masks, masks[1:], strict=False):
        assert 0.35 < (one != other).mean() < 0.65


def test_stack_axis_in_the_middle():
    spec = {"w": LoraSpec(64).with_axes(Axes((1,), (0,), (2,)))}
    frozen, tunable = init_lora({"w": jnp.zeros((64, 2, 64))}, spec, jax.random.key(0))
    eye = jnp.broadcast_to(jnp.eye(64), (2, 64, 64))  # [shared, in, rank] and [shared, rank, out]
    tunable = {"w": tunable["w"].with_factors({"a": eye, "b": eye})}
    model = lambda p, x: jnp.einsum("ebi,ieo->ebo", x, p["w"])  # noqa: E731
    masks = masks_of(model, frozen, tunable, jnp.ones((2, 4, 64)))
    assert masks.shape == (2, 4, 64) and 0.4 < masks.mean() < 0.6
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6

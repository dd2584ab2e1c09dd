"""OFT: the formula, uses of whole and of partial blocks, the bound, and invalid specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import (
    MaterializeError,
    OftSpec,
    SpecError,
    init_lora,
    lora,
    materialize,
    project_oft,
    testing,
    unmerge,
)
from lorax.kinds.oft import rotation

normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 2  # noqa: E731


def skew_of(q, size):
    """Each block's skew-symmetric matrix, in NumPy."""
    q = np.asarray(q, np.float64).reshape(-1, q.shape[-1])
    skew = np.zeros((len(q), size, size))
    skew[:, *np.triu_indices(size, 1)] = q
    return skew - skew.transpose(0, 2, 1)


def series(skew, terms: int):
    """The truncated Neumann series of the Cayley transform, as in the method's reference code."""
    identity = np.eye(skew.shape[-1])
    powers = [np.linalg.matrix_power(skew, k) for k in range(max(terms, 4))]
    last = {2: 1, 3: 3}.get(terms, terms - 1)
    weights = [2.0] * last if terms == 2 else [*[2.0] * (last - 1), 1.0]
    return identity + sum(w * p for w, p in zip(weights, powers[1:], strict=False))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7])
def test_rotation_matches_the_truncated_series(terms):
    q = normal(0, 3, 6)
    expected = series(skew_of(q, 4), terms) - np.eye(4)
    np.testing.assert_allclose(rotation(q, 4, terms), expected, rtol=1e-5, atol=1e-6)


def test_exact_rotation_is_orthogonal_and_the_series_approximates_its_transpose():
    q = normal(0, 3, 6) / 10
    exact = np.asarray(rotation(q, 4, None)) + np.eye(4)
    np.testing.assert_allclose(exact @ exact.transpose(0, 2, 1), [np.eye(4)] * 3, atol=1e-6)
    truncated = np.asarray(rotation(q, 4, 5)) + np.eye(4)
    np.testing.assert_allclose(truncated, exact.transpose(0, 2, 1), atol=2e-3)
    assert np.abs(truncated - exact).max() > 0.1


@pytest.mark.parametrize("terms", [5, None])
@pytest.mark.parametrize("block_share", [False, True])
@pytest.mark.parametrize("side", ["in", "out"])
def test_weight_is_rotated_block_by_block(side, block_share, terms):
    w = normal(1, 6, 8)
    spec = OftSpec(2, side, block_share=block_share, terms=terms)
    _, tunable = init_lora({"w": w}, {"w": spec}, jax.random.key(0))
    weight = testing.random_factors(tunable, jax.random.key(1))["w"]
    count = {"in": 3, "out": 4}[side]
    assert weight.q.shape == ((1,) if block_share else (count, 1))
    blocks = np.asarray(rotation(weight.q.reshape(-1, 1), 2, terms)) + np.eye(2)
    full = np.zeros((2 * count, 2 * count))
    for k in range(count):
        full[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = blocks[0 if block_share else k]
    expected = full @ np.asarray(w) if side == "in" else np.asarray(w) @ full
    np.testing.assert_allclose(materialize(w, weight), expected, rtol=1e-5, atol=1e-5)
    restored = unmerge({"w": materialize(w, weight)}, {"w": weight})["w"]
    np.testing.assert_allclose(restored, w, atol=1e-5)


@pytest.mark.parametrize("keywords", [{"block_share": True}, {"terms": None}, {"terms": 2}])
def test_settings_in_a_scan_of_layers(keywords):
    spec = {"w": OftSpec(3, shared_axes=[0], **keywords)}

    def model(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    testing.check(model, {"w": normal(0, 2, 6, 6)}, spec, normal(1, 4, 6), transforms=False)


def output_sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for value in eqn.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from output_sizes(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("side", ["in", "out"])
def test_no_array_is_as_large_as_the_weight(side):
    frozen, tunable = init_lora(
        {"w": normal(0, 20, 24)}, {"w": OftSpec(4, side)}, jax.random.key(0)
    )
    loss = lambda tunable, x: jnp.sum(lora(lambda p, x: x @ p["w"])((frozen, tunable), x) ** 2)  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(tunable, normal(1, 3, 20))
    assert max(output_sizes(jaxpr.jaxpr)) < 20 * 24


def test_convolution_kernels():
    def conv(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)

    params, x = {"w": normal(0, 3, 2, 4, 6)}, normal(1, 2, 5, 5, 4)
    testing.check(conv, params, {"w": OftSpec(2, channel_axis=2)}, x, transforms=False)
    pair = init_lora(params, {"w": OftSpec(2)}, jax.random.key(0))
    assert pair.tunable["w"].q.shape == (3, 2, 2, 1)
    with pytest.raises(MaterializeError, match="where its block-diagonal matrix cannot be applied"):
        lora(conv, on_materialize="error")(pair, x)
    testing.check(conv, params, {"w": OftSpec(2)}, x, transforms=False, materializes=True)


def test_complex_weight_is_rotated_by_real_blocks():
    params = {"w": lax.complex(normal(0, 6, 4), normal(1, 6, 4))}
    assert (
        init_lora(params, {"w": OftSpec(3)}, jax.random.key(0)).tunable["w"].q.dtype == jnp.float32
    )
    x = lax.complex(normal(2, 3, 6), normal(3, 3, 6))
    testing.check(lambda p, x: x @ p["w"], params, {"w": OftSpec(3)}, x, transforms=False)


# Uses that read part of a block, or its entries in another order.
PARTIAL_USES = {
    "flipped": lambda p, x: x @ p["w"][::-1],
    "cut in a block": lambda p, x: x[:, :3] @ p["w"][:3],
    "strided": lambda p, x: x[:, ::2] @ p["w"][::2],
    "one row": lambda p, x: x[:, :6] * p["w"][3][None],
    "scanned rows": lambda p, x: lax.scan(lambda c, w: (c + w, w), x[0, :6], p["w"])[1],
    "reshaped within blocks": lambda p, x: jnp.einsum(
        "bij,ijo->bo", x.reshape(3, 4, 2), p["w"].reshape(4, 2, 6)
    ),
}


@pytest.mark.parametrize(
    "use, size", [*((use, 4) for use in PARTIAL_USES), ("flipped", 8), ("scanned rows", 8)]
)
def test_part_of_a_block_materializes(use, size):
    spec = {"w": OftSpec(size)}
    params, x = {"w": normal(0, 8, 6)}, normal(1, 3, 8)
    testing.check(PARTIAL_USES[use], params, spec, x, transforms=False, materializes=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda p, x: x[:, 4:] @ p["w"][4:],
        lambda p, x: jnp.einsum("bni,nio->bo", x.reshape(3, 2, 4), p["w"].reshape(2, 4, 6)),
        lambda p, x: x @ p["w"][:, ::-1],
        lambda p, x: x @ (p["w"] * jnp.arange(1.0, 7)[None]),
        lambda p, x: x @ (-p["w"] / jnp.arange(1.0, 9)[:, None]),
    ],
    ids=["cut", "two axes", "flipped outputs", "gain", "gain along the blocks"],
)
def test_whole_blocks_are_not_materialized(use):
    testing.check(use, {"w": normal(0, 8, 6)}, {"w": OftSpec(4)}, normal(1, 3, 8), transforms=False)


def test_convolution_groups_that_contain_whole_blocks():
    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    params, x = {"w": normal(0, 3, 2, 4, 12)}, normal(1, 2, 5, 5, 8)
    testing.check(conv, params, {"w": OftSpec(3, "out")}, x, transforms=False)


@pytest.mark.parametrize(
    "spec, message",
    [
        (OftSpec(5), r"`w` .* block_size 5, which does not divide its axis 0 of size 12. Take 4,"),
        (OftSpec(4, "out"), "its axis 1 of size 7. Take 7,"),
        (OftSpec(1), "a block of one entry cannot rotate"),
        (OftSpec(True), "has block_size True"),
        (OftSpec(4, terms=1), "has 1 terms of the Neumann series"),
        (OftSpec(4, "up"), "of side 'up'"),  # pyright: ignore[reportArgumentType]
        (OftSpec(4, channel_axis=1), r"channel_axis=1, but the axes of side 'in' are \(0,\)"),
        (OftSpec(4, channel_axis=5), "channel_axis"),
    ],
)
def test_invalid_spec_raises(spec, message):
    with pytest.raises(SpecError, match=message):
        init_lora({"w": jnp.ones((12, 7))}, {"w": spec}, jax.random.key(0))


def test_eps_bounds_each_block_and_passes_the_gradient():
    w, eps = normal(1, 6, 5), 0.2
    _, tunable = init_lora({"w": w}, {"w": OftSpec(2, eps=eps)}, jax.random.key(0))
    # Three blocks: within the bound, on it, and beyond it.
    bound = eps / np.sqrt(3)
    q = jnp.asarray([[0.5], [1.0], [40.0]]) * bound / np.sqrt(2)
    bounded = tunable["w"].with_factors({"q": q})
    within = jnp.asarray([[0.5], [1.0], [1.0]]) * bound / np.sqrt(2)
    free = init_lora({"w": w}, {"w": OftSpec(2)}, jax.random.key(0)).tunable["w"]
    value = lambda weight, q: materialize(w, weight.with_factors({"q": q}))  # noqa: E731
    np.testing.assert_allclose(value(bounded, q), value(free, within), rtol=1e-6)
    gradient = lambda weight, q: jax.grad(lambda q: jnp.sum(jnp.sin(value(weight, q))))(q)  # noqa: E731
    np.testing.assert_allclose(gradient(bounded, q), gradient(free, within), rtol=1e-5)
    np.testing.assert_allclose(project_oft({"w": bounded, "x": None})["w"].q, within, rtol=1e-6)
    restored = unmerge({"w": materialize(w, bounded)}, {"w": bounded})["w"]
    np.testing.assert_allclose(restored, w, atol=1e-5)


def test_eps_bounds_each_entry_of_a_stack():
    w = normal(1, 4, 6, 5)
    spec = {"w": OftSpec(3, shared_axes=[0], eps=0.1)}
    _, tunable = init_lora({"w": w}, spec, jax.random.key(0))
    q = project_oft(jax.tree.map(lambda q: q + 1, tunable))["w"].q  # [stack, 2 blocks, 3]
    np.testing.assert_allclose(jnp.sqrt(2 * jnp.sum(q**2, -1)), 0.1 / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("eps", [0, -1.0, float("inf"), True, "1"])
def test_invalid_eps_raises(eps):
    with pytest.raises(SpecError, match="`w` has eps"):
        init_lora({"w": normal(0, 6, 4)}, {"w": OftSpec(2, eps=eps)}, jax.random.key(0))

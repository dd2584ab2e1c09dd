"""`jax.export` with symbolic shapes: one program serves any adapter, batch and length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from lorax import LoraSpec, explain, infer_spec, init_lora, lora, testing

STACKED = LoraSpec(2, shared_axes=[0])
SIZES = [{"b": 2, "t": 3, "h": 5, "w": 7}, {"b": 4, "t": 9, "h": 8, "w": 6}]
NHWC = ("NHWC", "HWIO", "NHWC")


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None, None]) @ p["v"]


def attend(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def attention(p, x):
    heads = ((x @ p[name]).reshape(*x.shape[:2], 2, 3) for name in "qkv")
    return attend(*heads).reshape(*x.shape[:2], 6) @ p["o"]


def relative_positions(p, x):
    t = jnp.arange(x.shape[1])
    bias = p["w"][jnp.clip(t[:, None] - t[None], -3, 3) + 3]
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x)[..., None] + bias[None], 2)
    return jnp.einsum("bqkh,bkd->bqhd", weights, x)


def tied(p, ids):
    x = p["w"][ids] + jnp.take(p["v"], jnp.arange(ids.shape[1]), axis=0, mode="clip")[None]
    return jnp.tanh(x) @ p["w"].T


def convnet(p, x):
    x = lax.conv_general_dilated(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC)
    return lax.conv_general_dilated(
        jnp.tanh(x), p["v"], (1, 1), "VALID", dimension_numbers=NHWC, feature_group_count=2
    ).mean((1, 2))


def window_of_the_outputs(p, x):
    """Here the kernel of `b` has the window, and the padding that "SAME" adds."""
    return lax.conv_general_dilated(
        x, p["w"], (2,), "SAME", rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
    )


def queries(p, x):
    """Attention pooling with the same learned queries for every example."""
    q = jnp.einsum("bqd,dhk->bqhk", jnp.tile(p["w"], (x.shape[0], 1, 1)), p["q"])
    k = jnp.einsum("btd,dhk->bthk", x, p["k"])
    return attend(q, k, k)


def flat_queries(p, x):
    b = x.shape[0]
    latents = jnp.broadcast_to(p["w"], (b, 5, 8)).reshape(b * 5, 8) @ p["v"]
    return jnp.tanh(latents).reshape(b, 5, 6) + x.mean((1, 2))[:, None, None]


def copies_in_another_order(p, x):
    # JAX cannot say which is larger, 3 or b.
    b = x.shape[0]
    copies = jnp.broadcast_to(p["w"][0], (3, b, 5, 8)).reshape(b, 3, 5, 8)
    return jnp.tanh(copies @ p["v"]).sum((1, 2)) + x.mean((1, 2))[:, None]


def prefix(p, x):
    tokens = jnp.broadcast_to(p["w"], (x.shape[0], 5, 8))
    return jnp.concatenate([tokens, x], 1) @ p["v"]


def summed_over_the_batch(p, x):
    return jnp.tanh(x) @ jnp.broadcast_to(p["w"], (x.shape[0], 8, 6)).sum(0)


def scanned_layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def scanned_tokens(p, x):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["v"])
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[0], 6)), jnp.swapaxes(x, 0, 1))[1]


def expert_of_each_token(p, x):
    kernels = p["w"][jnp.arange(x.shape[1]) % 3] * x.mean((0, 2))[:, None, None] * 2.0
    return jnp.einsum("btd,tdo->bto", x, kernels)


W = {"w": (8, 6)}
TWO = {"w": (8, 6), "v": (6, 4)}
LEARNED = {"w": (1, 5, 8), "v": (8, 6)}
TOKENS = "b, t, 8"

# Function, shapes of the parameters, spec, shape of the argument.
ROWS = {
    "mlp": (mlp, TWO | {"b": (6,)}, {"w": 2, "v": 2, "b": -1}, TOKENS),
    "attention": (
        attention,
        {"q": (8, 6), "k": (8, 6), "v": (8, 6), "o": (6, 8)},
        dict.fromkeys("qkvo", 2),
        TOKENS,
    ),
    "relative positions": (relative_positions, {"w": (7, 2)}, {"w": 2}, TOKENS),
    "embedding, tied head": (tied, {"w": (19, 5), "v": (11, 5)}, {"w": 2, "v": 2}, "b, t"),
    "convnet": (convnet, {"w": (3, 3, 4, 6), "v": (2, 2, 3, 8)}, {"w": 2, "v": 2}, "b, h, w, 4"),
    "window of the outputs": (
        window_of_the_outputs, {"w": (3, 8, 6)}, {"w": LoraSpec(2, in_axes=[1])}, TOKENS
    ),
    "learned queries": (
        queries,
        {"w": (1, 5, 8), "q": (8, 2, 3), "k": (8, 2, 3)},
        {"w": 2, "q": LoraSpec(2, in_axes=[0]), "k": LoraSpec(2, in_axes=[0])},
        TOKENS,
    ),
    "flat queries": (flat_queries, LEARNED, {"w": 2, "v": 2}, TOKENS),
    "copies in another order": (copies_in_another_order, LEARNED, {"w": 2, "v": 2}, TOKENS),
    "prefix": (prefix, LEARNED, {"w": 2, "v": 2}, TOKENS),
    "batch summed": (summed_over_the_batch, W, {"w": 2}, TOKENS),
    "scanned layers": (scanned_layers, {"w": (3, 8, 8)}, {"w": STACKED}, TOKENS),
    "scanned tokens": (scanned_tokens, {"w": (8, 6), "v": (6, 6)}, {"w": 2, "v": 2}, TOKENS),
    "vmap": (lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), W, {"w": 2}, TOKENS),
    "remat": (
        lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])(p, x),
        TWO,
        {"w": 2, "v": 2},
        TOKENS,
    ),
    "cond": (
        lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: jnp.cos(x) @ p["w"]),
        W,
        {"w": 2},
        TOKENS,
    ),
    "experts": (expert_of_each_token, {"w": (3, 8, 6)}, {"w": STACKED}, TOKENS),
    "weight of weights": (lambda p, x: x @ (p["w"] @ p["v"]), TWO, {"w": 2, "v": 2}, TOKENS),
}  # fmt: skip


def symbolic(row):
    """The argument as a symbolic shape, in a scope of its own."""
    *_, shape = ROWS[row]
    dtype = jnp.int32 if shape == "b, t" else jnp.float32
    return jax.ShapeDtypeStruct(export.symbolic_shape(shape), dtype)


def argument(row, sizes):
    shape = [sizes.get(str(size), size) for size in symbolic(row).shape]
    numbers = np.random.default_rng(0).integers(0, 19, [int(size) for size in shape])
    if symbolic(row).dtype == jnp.int32:
        return jnp.asarray(numbers, jnp.int32)
    return jnp.asarray(numbers / 19 - 0.5, jnp.float32)


def adapted(row):
    fn, shapes, spec, _ = ROWS[row]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape) / 3
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    frozen, tunable = init_lora(params, spec, jax.random.key(1))
    # Learned queries are materialized where softmax takes them, at any size.
    return lora(fn, on_materialize="allow"), frozen, testing.random_factors(tunable, keys[0])


@pytest.mark.parametrize("row", ROWS)
def test_one_program_serves_every_size(row):
    fn, frozen, tunable = adapted(row)
    program = export.export(jax.jit(fn))((frozen, tunable), symbolic(row))
    other = jax.tree.map(lambda leaf: leaf / 2, tunable)
    for sizes, adapters in zip(SIZES, (tunable, other), strict=True):
        x = argument(row, sizes)
        got, expected = program.call((frozen, adapters), x), fn((frozen, adapters), x)
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["mlp", "attention", "embedding, tied head", "convnet"])
def test_one_gradient_program_serves_every_size(row):
    fn, frozen, tunable = adapted(row)
    gradient = jax.grad(lambda tunable, x: (fn((frozen, tunable), x) ** 2).sum())
    program = export.export(jax.jit(gradient))(tunable, symbolic(row))
    for sizes in SIZES:
        x = argument(row, sizes)
        pairs = zip(
            jax.tree.leaves(program.call(tunable, x)),
            jax.tree.leaves(gradient(tunable, x)),
            strict=True,
        )
        assert all(np.allclose(actual, wanted, rtol=1e-3, atol=1e-4) for actual, wanted in pairs)


def test_a_deserialized_program_gives_the_same_result():
    fn, frozen, tunable = adapted("mlp")
    program = export.export(jax.jit(fn))((frozen, tunable), symbolic("mlp"))
    x = argument("mlp", SIZES[0])
    deserialized = export.deserialize(program.serialize())
    assert (deserialized.call((frozen, tunable), x) == program.call((frozen, tunable), x)).all()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore::lorax.UnadaptedWarning")
def test_infer_spec_is_the_same_as_for_known_sizes(row):
    fn, shapes, *_ = ROWS[row]
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    infer = lambda x: infer_spec(fn, params, x, rank=1, skip_small=False)  # noqa: E731
    assert infer(symbolic(row)) == infer(argument(row, SIZES[0]))


def test_explain_has_everything_but_costs():
    fn, *_ = ROWS["mlp"]
    _, frozen, tunable = adapted("mlp")
    known = explain(fn, (frozen, tunable), argument("mlp", SIZES[0]))
    report = explain(fn, (frozen, tunable), symbolic("mlp"))
    assert report.rows == known.rows
    assert (report.base.flops, report.adapted.bytes) == (None, None)
    assert "FLOPs" not in str(report) and "covered" in str(report)


def test_a_materialized_weight_is_reported_with_its_symbolic_shape():
    model = lambda p, x: jnp.tanh(jnp.broadcast_to(p["w"], (x.shape[0], 8, 6)))  # noqa: E731
    pair = init_lora({"w": jnp.ones((8, 6))}, {"w": 2}, jax.random.key(0))
    with pytest.warns(UserWarning, match=r"`tanh` as an array of shape \(b, 8, 6\)"):
        export.export(jax.jit(lora(model)))(pair, symbolic("mlp"))


def test_check_of_shapes_raises():
    with pytest.raises(TypeError, match="needs arrays.*several concrete"):
        testing.check(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 6))}, {"w": 2}, symbolic("mlp"))

"""Residuals of the backward pass: no more than hand-written LoRA keeps."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, LoraWeight, init_lora, lora, with_dropout
from lorax.testing import random_factors

LAYERS, BATCH, TIME, WIDTH, HIDDEN, TOKENS = 3, 2, 5, 6, 10, 11


def residuals(fn, x):
    """The number of residuals of `fn` at `x`, their total bytes, and a count for each size."""
    _, tangent = jax.linearize(fn, x)
    kept = [array.nbytes for array in jax.make_jaxpr(tangent)(x).consts]
    return len(kept), sum(kept), sorted(Counter(kept).items())


# A model applies its weights through `use`, which is made by `without_lora` or `hand_written`.


def without_lora(p, _):
    return lambda name, w_of_x, delta_of_x, x: w_of_x(p[name], x)


def hand_written(p, f):
    return lambda name, w_of_x, delta_of_x, x: (
        w_of_x(p[name], x) + delta_of_x(f[name]["a"], f[name]["b"], x)
    )


def dense(use, name, x):
    return use(name, lambda w, x: x @ w, lambda a, b, x: (x @ a) @ b, x)


def block(use, x):
    """Three adapters share an input; that of `down` is a residual of tanh as well."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    q, k, v = (dense(use, name, h) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
    x = x + dense(use, "o", jnp.einsum("bts,bsd->btd", scores, v))
    return x + dense(use, "down", jnp.tanh(dense(use, "up", x)))


BLOCK = {name: (WIDTH, WIDTH) for name in "qkvo"} | {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


def unrolled(remat, make_use, params, factors, x):
    run = jax.checkpoint(lambda p, f, x: block(make_use(p, f), x)) if remat else None
    for k in range(LAYERS):
        p, f = jax.tree.map(lambda leaf, k=k: leaf[k], (params, factors))
        x = run(p, f, x) if run else block(make_use(p, f), x)
    return x


def scanned(remat, make_use, params, factors, x):
    def body(x, layer):
        return block(make_use(*layer), x), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, (params, factors))[0]


def tied(make_use, params, factors, tokens):
    use = make_use(params, factors)
    x = use("table", lambda w, t: w[t], lambda a, b, t: a[t] @ b, tokens)
    return use("table", lambda w, x: x @ w.T, lambda a, b, x: (x @ b.T) @ a.T, jnp.sin(x))


def convolved(make_use, params, factors, x):
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    use = make_use(params, factors)
    return jnp.sin(use("w", lambda w, x: conv(x, w), lambda a, b, x: conv(x, a) @ b, jnp.sin(x)))


def experts(make_use, params, factors, x):
    """Each expert takes rows of every example."""
    multiply = functools.partial(jnp.einsum, "beti,eio->beto")
    use = make_use(params, factors)
    return use("w", lambda w, x: multiply(x, w), lambda a, b, x: multiply(multiply(x, a), b), x)


def stacked(shapes):
    return {name: (LAYERS, *shape) for name, shape in shapes.items()}


PER_LAYER = LoraSpec(2, shared_axes=[0])
ROWS = {
    f"{run.__name__}{', remat' * remat}": (
        functools.partial(run, remat), stacked(BLOCK), PER_LAYER, (BATCH, TIME, WIDTH)
    )
    for run in (unrolled, scanned)
    for remat in (False, True)
} | {
    "tied": (tied, {"table": (TOKENS, WIDTH)}, LoraSpec(2), (BATCH, TIME)),
    "convolution": (
        convolved,
        {"w": (3, 3, WIDTH, HIDDEN)},
        LoraSpec(2, in_axes=[0, 1, 2]),
        (BATCH, 4, 4, WIDTH),
    ),
    "experts": (
        experts, {"w": (LAYERS, WIDTH, HIDDEN)}, PER_LAYER, (BATCH, LAYERS, TIME, WIDTH)
    ),
}  # fmt: skip


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("row", ROWS)
def test_keeps_no_more_than_hand_written_lora(row, jit):
    model, shapes, spec, x_shape = ROWS[row]
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    frozen, tunable = init_lora(params, dict.fromkeys(shapes, spec), jax.random.key(0))
    # Small, because the deltas add up over the layers.
    tunable = jax.tree.map(lambda leaf: leaf / 4, random_factors(tunable, jax.random.key(1)))
    factors = jax.tree.map(
        lambda weight: {"a": weight.a, "b": weight.b},
        tunable,
        is_leaf=lambda node: isinstance(node, LoraWeight),
    )
    x = jnp.ones(x_shape) if row != "tied" else jnp.zeros(x_shape, jnp.int32)
    no_factors = dict.fromkeys(params)

    def adapted(tunable):
        return lora(lambda params, x: model(without_lora, params, no_factors, x))(
            (frozen, tunable), x
        )

    def reference(factors):
        return model(hand_written, params, factors, x)

    wrap = jax.jit if jit else lambda fn: fn
    assert jnp.allclose(adapted(tunable), reference(factors), rtol=1e-4, atol=1e-4)
    kept, allowed = residuals(wrap(adapted), tunable), residuals(wrap(reference), factors)
    assert kept[0] <= allowed[0] and kept[1] <= allowed[1], (kept, allowed)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_dropout_does_not_keep_masked_inputs(jit):
    params = {"q": jnp.ones((32, 48)) / 32, "k": jnp.ones((32, 48)) / 32}
    frozen, tunable = init_lora(params, {"q": 2, "k": 2}, jax.random.key(0))
    tunable = random_factors(tunable, jax.random.key(1))
    x = jnp.ones((64, 32))
    model = lora(lambda p, x: jnp.sin(x @ p["q"]) + x @ p["k"])
    wrap = jax.jit if jit else lambda fn: fn

    def dropped(tunable):
        return model((frozen, with_dropout(tunable, jax.random.key(2), 0.1)), x)

    _, without, _ = residuals(wrap(lambda tunable: model((frozen, tunable), x)), tunable)
    _, kept, _ = residuals(wrap(dropped), tunable)
    # A masked input has as many bytes as `x`; a key has 8.
    assert kept <= without + 64 < without + x.nbytes

"""The benchmarked models, written plainly: nothing in here knows about LoRA."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 12, 128, 4, 512, 1000
BATCH, TIME, PIXELS, CHANNELS = 4, 64, 16, 32


class Model(NamedTuple):
    """A function of parameters and a batch, with both."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batch: jax.Array


def kernel(key, *shape):
    fan_in = functools.reduce(lambda a, b: a * b, shape[:-1])
    return jax.random.normal(key, shape) / fan_in**0.5


def norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attend(q, k, v, heads=HEADS):
    """Causal attention over [batch, time, width]."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


# Transformer blocks


def block(p, x):
    h = norm(p["norm1"], x)
    x = x + attend(h @ p["q"], h @ p["k"], h @ p["v"]) @ p["o"]
    h = norm(p["norm2"], x)
    return x + jax.nn.gelu(h @ p["up"]) @ p["down"]


def init_block(key):
    shapes = {name: (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: kernel(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"norm1": jnp.ones(WIDTH), "norm2": jnp.ones(WIDTH)}


def unrolled(remat: bool, layers: int = LAYERS) -> Model:
    run = jax.checkpoint(block) if remat else block

    def apply(params, x):
        for p in params:
            x = run(p, x)
        return x

    params = [init_block(key) for key in jax.random.split(jax.random.key(0), layers)]
    return Model(apply, params, jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH)))


def scanned(remat: bool) -> Model:
    run = jax.checkpoint(block) if remat else block

    def apply(params, x):
        return jax.lax.scan(lambda x, p: (run(p, x), None), x, params)[0]

    params = jax.vmap(init_block)(jax.random.split(jax.random.key(0), LAYERS))
    return Model(apply, params, jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH)))


# Others


def mlp() -> Model:
    def apply(params, x):
        for p in params[:-1]:
            x = jax.nn.relu(x @ p["kernel"] + p["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    sizes = (WIDTH, HIDDEN, HIDDEN, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        {"kernel": kernel(key, n, m), "bias": jnp.zeros(m)}
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    return Model(apply, params, jax.random.normal(keys[-1], (BATCH * TIME, WIDTH)))


def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def convnet() -> Model:
    """A plain, a depthwise, a pointwise and a grouped convolution."""

    def apply(params, x):
        x = jax.nn.relu(conv(x, params["stem"], stride=2))
        x = jax.nn.relu(conv(x, params["depthwise"], groups=CHANNELS))
        x = jax.nn.relu(conv(x, params["pointwise"]))
        x = jax.nn.relu(conv(x, params["grouped"], groups=2))
        return x.mean((1, 2)) @ params["head"]

    shapes = {
        "stem": (5, 5, 16, CHANNELS),
        "depthwise": (3, 3, 1, CHANNELS),
        "pointwise": (1, 1, CHANNELS, 2 * CHANNELS),
        "grouped": (3, 3, CHANNELS, 2 * CHANNELS),
        "head": (2 * CHANNELS, 10),
    }
    *keys, last = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = {
        name: kernel(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return Model(apply, params, jax.random.normal(last, (BATCH, PIXELS, PIXELS, 16)))


def tied() -> Model:
    """An embedding whose table is the output layer too."""

    def apply(params, tokens):
        x = params["embedding"][tokens]
        x = x + jax.nn.gelu(norm(params["norm"], x) @ params["up"]) @ params["down"]
        return x @ params["embedding"].T

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embedding": kernel(keys[0], VOCABULARY, WIDTH),
        "norm": jnp.ones(WIDTH),
        "up": kernel(keys[1], WIDTH, HIDDEN),
        "down": kernel(keys[2], HIDDEN, WIDTH),
    }
    return Model(apply, params, jax.random.randint(keys[3], (BATCH, TIME), 0, VOCABULARY))

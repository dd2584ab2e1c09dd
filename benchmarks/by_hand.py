"""The same models with LoRA written into them, as a careful user would.

Each is a function of the factors, the frozen parameters and a batch. `factors` has
`{"a": …, "b": …}` in the place of every adapted weight.
"""

import jax
import jax.numpy as jnp

import models
from models import attend, conv, norm


def dense(f, w, x):
    return x @ w + (x @ f["a"]) @ f["b"]


def block(f, p, x):
    h = norm(p["norm1"], x)
    q, k, v = (dense(f[name], p[name], h) for name in "qkv")
    x = x + dense(f["o"], p["o"], attend(q, k, v))
    h = norm(p["norm2"], x)
    return x + dense(f["down"], p["down"], jax.nn.gelu(dense(f["up"], p["up"], h)))


def unrolled(remat):
    run = jax.checkpoint(block) if remat else block

    def apply(factors, params, x):
        for f, p in zip(factors, params, strict=True):
            x = run(f, p, x)
        return x

    return apply


def scanned(remat):
    run = jax.checkpoint(block) if remat else block

    def apply(factors, params, x):
        return jax.lax.scan(lambda x, layer: (run(*layer, x), None), x, (factors, params))[0]

    return apply


def mlp(factors, params, x):
    for f, p in zip(factors[:-1], params[:-1], strict=True):
        x = jax.nn.relu(dense(f["kernel"], p["kernel"], x) + p["bias"])
    return dense(factors[-1]["kernel"], params[-1]["kernel"], x) + params[-1]["bias"]


def adapted_conv(f, w, x, stride=1):
    """The window with the first factor; over the rank, a product."""
    return conv(x, w, stride) + conv(x, f["a"], stride) @ f["b"]


def adapted_grouped_conv(f, w, x, groups):
    """Every group sees the same first factor, and its own part of the second."""
    rank, out = f["b"].shape
    middle = conv(x, jnp.tile(f["a"], groups), groups=groups)
    middle = middle.reshape(*middle.shape[:3], groups, rank)
    b = f["b"].reshape(rank, groups, out // groups)
    delta = jnp.einsum("nhwgr,rgo->nhwgo", middle, b)
    return conv(x, w, groups=groups) + delta.reshape(*delta.shape[:3], out)


def convnet(f, p, x):
    x = jax.nn.relu(adapted_conv(f["stem"], p["stem"], x, stride=2))
    x = jax.nn.relu(adapted_grouped_conv(f["depthwise"], p["depthwise"], x, models.CHANNELS))
    x = jax.nn.relu(adapted_conv(f["pointwise"], p["pointwise"], x))
    x = jax.nn.relu(adapted_grouped_conv(f["grouped"], p["grouped"], x, 2))
    return dense(f["head"], p["head"], x.mean((1, 2)))


def tied(f, p, tokens):
    a, b = f["embedding"]["a"], f["embedding"]["b"]
    x = p["embedding"][tokens] + a[tokens] @ b
    h = dense(f["up"], p["up"], norm(p["norm"], x))
    x = x + dense(f["down"], p["down"], jax.nn.gelu(h))
    return x @ p["embedding"].T + (x @ b.T) @ a.T

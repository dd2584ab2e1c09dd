"""The benchmarked models, each written once.

`ops` computes each use of a weight (see layer_ops.py), so nothing in this file knows about LoRA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layer_ops import PLAIN, PlainOps


class Leaf(NamedTuple):
    """One parameter of nested dicts."""

    path: tuple[str, ...]

    def get(self, params: Any) -> jax.Array:
        """The parameter."""
        return functools.reduce(lambda tree, name: tree[name], self.path, params)

    def replace(self, params: Any, leaf: jax.Array) -> Any:
        """The parameters with this one replaced."""
        first, *rest = self.path
        subtree = Leaf(tuple(rest)).replace(params[first], leaf) if rest else leaf
        return {**params, first: subtree}


class Library(NamedTuple):
    """The model made of a library's modules."""

    apply: Callable[[Any, Any], Any]  # (params, batch) -> output
    module: Any  # a Linen module
    # (its `init` or `apply`, the first argument, batch)
    call: Callable[[Any, Any, Any], Any] = lambda method, first, batch: method(first, batch)
    output: Callable[[Any], Any] = lambda outputs: outputs  # from what `apply` returns


class Model(NamedTuple):
    """`forward(ops, factors, params, batch)`, with parameters and a batch."""

    forward: Callable[[PlainOps, Any, Any, Any], Any]
    params: Any
    batch: Any
    library: Library | None = None
    where: Any = "*"  # which weights are adapted, as `lorax.infer_spec` takes it
    bottom: Leaf | None = None  # a parameter near the input, for batches that have no gradient
    stack: int = 0  # number of stacked layers that a scan goes over

    def apply(self, params: Any, batch: Any) -> Any:
        """The output without LoRA."""
        if self.library is not None:
            return self.library.apply(params, batch)
        return self.forward(PLAIN, jax.tree.map(lambda _: None, params), params, batch)

    def with_ops(self, ops: PlainOps) -> Callable[[Any, Any, Any], Any]:
        """The model with LoRA written into it: a function of factors, parameters and a batch."""
        return lambda factors, params, batch: self.forward(ops, factors, params, batch)


def kernel(key, *shape):
    """A random kernel whose fan-in is the product of all axes but the last."""
    return jax.random.normal(key, shape) / math.prod(shape[:-1]) ** 0.5


def kernels(key, shapes):
    keys = jax.random.split(key, len(shapes))
    return {name: kernel(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def split_heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def attend(q, k, v):
    """Attention over [batch, time, head, width]; a query sees no later key."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    past = k.shape[1] - q.shape[1]
    scores = jnp.where(jnp.tri(*scores.shape[-2:], past, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


# Transformer blocks


def block(ops, heads, f, p, x, cache=None):
    """The output, and the keys and values, appended to those of the cache."""
    h = norm(p["norm1"], x)
    q, k, v = (split_heads(part, heads) for part in ops.dense_each(f, p, "qkv", h))
    if cache is not None:
        k, v = (jnp.concatenate(pair, 1) for pair in zip(cache, (k, v), strict=True))
    mixed = attend(q, k, v)
    x = x + ops.dense(f["o"], p["o"], mixed.reshape(*mixed.shape[:2], -1))
    h = jax.nn.gelu(ops.dense(f["up"], p["up"], norm(p["norm2"], x)))
    return x + ops.dense(f["down"], p["down"], h), (k, v)


def init_block(key, width, hidden):
    shapes = {name: (width, width) for name in "qkvo"}
    shapes |= {"up": (width, hidden), "down": (hidden, width)}
    return kernels(key, shapes) | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}


def init_blocks(layers, width, hidden):
    return [init_block(key, width, hidden) for key in jax.random.split(jax.random.key(0), layers)]


def blocks(
    layers=12, width=128, hidden=512, heads=4, batch=4, time=64, *, scan=False, remat=False
) -> Model:
    """The blocks of a GPT."""

    def forward(ops, factors, params, x):
        def run(x, layer):
            return block(ops, heads, *layer, x)[0], None

        run = jax.checkpoint(run) if remat else run
        if scan:
            return jax.lax.scan(run, x, (factors, params))[0]
        for layer in zip(factors, params, strict=True):
            x, _ = run(x, layer)
        return x

    params = init_blocks(layers, width, hidden)
    if scan:
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    x = jax.random.normal(jax.random.key(1), (batch, time, width))
    return Model(forward, params, x, stack=layers if scan else 0)


def decoding(layers=6, width=512, hidden=2048, heads=8, past=127) -> Model:
    """Decodes one token, with the keys and values of earlier tokens cached."""

    def forward(ops, factors, params, batch):
        x, keys_and_values = batch["x"], []
        for f, p, cache in zip(factors, params, batch["cache"], strict=True):
            x, (k, v) = block(ops, heads, f, p, x, cache)
            keys_and_values.append((k[:, -1], v[:, -1]))
        return x, keys_and_values

    first, *keys = jax.random.split(jax.random.key(1), 1 + 2 * layers)
    cached = [jax.random.normal(key, (1, past, heads, width // heads)) for key in keys]
    batch = {
        "x": jax.random.normal(first, (1, 1, width)),
        "cache": list(zip(cached[::2], cached[1::2], strict=True)),
    }
    return Model(forward, init_blocks(layers, width, hidden), batch)


# Others


def mlp(sizes=(128, 512, 512, 10), batch=256) -> Model:
    """Linear layers with a bias, and ReLU between them."""

    def forward(ops, factors, params, x):
        layers = list(zip(factors, params, strict=True))
        for f, p in layers[:-1]:
            x = jax.nn.relu(ops.dense(f["kernel"], p["kernel"], x) + p["bias"])
        f, p = layers[-1]
        return ops.dense(f["kernel"], p["kernel"], x) + p["bias"]

    *keys, last = jax.random.split(jax.random.key(0), len(sizes))
    # ReLU halves the mean square of its input. Without the factor, activations would vanish.
    params = [
        {"kernel": 2**0.5 * kernel(key, n, m), "bias": jnp.zeros(m)}
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    return Model(forward, params, jax.random.normal(last, (batch, sizes[0])))


def convnet(images=4, pixels=16, channels=32, colors=16) -> Model:
    """A plain, a depthwise, a pointwise and a grouped convolution."""

    def forward(ops, f, p, x):
        x = jax.nn.relu(ops.conv(f["stem"], p["stem"], x, stride=2))
        x = jax.nn.relu(ops.conv(f["depthwise"], p["depthwise"], x, groups=channels))
        x = jax.nn.relu(ops.conv(f["pointwise"], p["pointwise"], x))
        x = jax.nn.relu(ops.conv(f["grouped"], p["grouped"], x, groups=2))
        return ops.dense(f["head"], p["head"], x.mean((1, 2)))

    shapes = {
        "stem": (5, 5, colors, channels),
        "depthwise": (3, 3, 1, channels),
        "pointwise": (1, 1, channels, 2 * channels),
        "grouped": (3, 3, channels, 2 * channels),
        "head": (2 * channels, 10),
    }
    batch = jax.random.normal(jax.random.key(1), (images, pixels, pixels, colors))
    return Model(forward, kernels(jax.random.key(0), shapes), batch)


def tied(vocabulary=1000, width=128, hidden=512, batch=4, time=64) -> Model:
    """An embedding whose table is also the output layer."""

    def forward(ops, f, p, tokens):
        x = ops.embed(f["embedding"], p["embedding"], tokens)
        h = jax.nn.gelu(ops.dense(f["up"], p["up"], norm(p["norm"], x)))
        x = x + ops.dense(f["down"], p["down"], h)
        return ops.logits(f["embedding"], p["embedding"], x)

    shapes = {"embedding": (vocabulary, width), "up": (width, hidden), "down": (hidden, width)}
    params = kernels(jax.random.key(0), shapes) | {"norm": jnp.ones(width)}
    tokens = jax.random.randint(jax.random.key(1), (batch, time), 0, vocabulary)
    return Model(forward, params, tokens, bottom=Leaf(("norm",)))


def experts(count=8, tokens=512, capacity=96, width=256, hidden=1024) -> Model:
    """A layer of experts: each token goes to the one that the router picks, up to its capacity."""

    def forward(ops, f, p, x):
        gates = jax.nn.softmax(ops.dense(f["router"], p["router"], norm(p["norm"], x)))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), count)
        # A token's position among those of its expert. Beyond the capacity, its row is zero.
        position = jnp.where(chosen > 0, jnp.cumsum(chosen, 0) - 1, capacity).astype(int)
        sent = chosen[..., None] * jax.nn.one_hot(position, capacity)
        h = jnp.einsum("nec,nd->ecd", sent, x)
        h = jax.nn.gelu(ops.experts(f["up"], p["up"], h))
        h = ops.experts(f["down"], p["down"], h)
        return x + jnp.einsum("nec,ne,ecd->nd", sent, gates, h)

    shapes = {
        "router": (width, count),
        "up": (count, width, hidden),
        "down": (count, hidden, width),
    }
    params = kernels(jax.random.key(0), shapes) | {"norm": jnp.ones(width)}
    return Model(forward, params, jax.random.normal(jax.random.key(1), (tokens, width)))

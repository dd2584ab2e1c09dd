"""A Llama in plain JAX, scanned and rematerialized, and the same with hand-written LoRA."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from programs import Model


class Size(NamedTuple):
    """The sizes of a model. With `chunk`, attention runs over chunks of so many queries."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    chunk: int | None = None


SEVEN_BILLION = Size(layers=32, width=4096, hidden=11008, heads=32, vocabulary=32000)
EIGHT_BILLION = Size(32, 4096, 14336, heads=32, vocabulary=128256, kv_heads=8, chunk=256)
# 5 and 7 divide the sizes of weights, but never both the size of an activation or of its shards.
SMALL = Size(layers=4, width=5 * 64, hidden=7 * 128, heads=4, vocabulary=1024)


def shapes(size: Size, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The shapes of the parameters."""
    square, wide = (size.width, size.width), (size.width, size.hidden)
    keys = (size.width, size.width * (size.kv_heads or size.heads) // size.heads)
    kernels = {"q": square, "k": keys, "v": keys, "o": square}
    kernels |= {"gate": wide, "up": wide, "down": wide[::-1]}
    norms = {"norm1": (size.width,), "norm2": (size.width,)}
    tree = {
        "embedding": (size.vocabulary, size.width),
        "layers": {k: (size.layers, *shape) for k, shape in (kernels | norms).items()},
        "norm": (size.width,),
        "head": (size.width, size.vocabulary),
    }
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=is_shape)


def norm(scale, x):
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return normed.astype(x.dtype) * scale


def rotate(x):
    """Rotary positions over [batch, time, head, channel]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def attention(q, k, v, chunk: int | None):
    """Causal attention. With chunks of queries, the backward pass recomputes the scores."""
    if chunk is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    batch, length, heads, channels = q.shape

    def attend_chunk(queries, start):
        mask = start + jnp.arange(chunk)[:, None] >= jnp.arange(length)
        return jax.nn.dot_product_attention(queries, k, v, mask=mask[None, None])

    chunks = jnp.moveaxis(q.reshape(batch, -1, chunk, heads, channels), 1, 0)
    starts = jnp.arange(0, length, chunk)
    mixed = jax.lax.map(lambda pair: jax.checkpoint(attend_chunk)(*pair), (chunks, starts))
    return jnp.moveaxis(mixed, 0, 1).reshape(q.shape)


def block(dense: Callable[..., Any], size: Size, layer: Any, x):
    """One layer; `dense(layer, name, x)` is a product with the layer's weight of that name."""
    scales = layer[0] if isinstance(layer, tuple) else layer
    h = norm(scales["norm1"], x)
    channels = size.width // size.heads
    q, k, v = (dense(layer, name, h).reshape(*h.shape[:2], -1, channels) for name in "qkv")
    mixed = attention(rotate(q), rotate(k), v, size.chunk)
    x = x + dense(layer, "o", mixed.reshape(h.shape))
    h = norm(scales["norm2"], x)
    h = jax.nn.silu(dense(layer, "gate", h)) * dense(layer, "up", h)
    return x + dense(layer, "down", h)


def run(dense: Callable[..., Any], size: Size, params: Any, layers: Any, tokens):
    """The logits, or with chunks the mean loss, since all logits are larger than the model."""
    step = jax.checkpoint(functools.partial(block, dense, size))
    x = params["embedding"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (step(layer, x), None), x, layers)
    x = norm(params["norm"], x)
    if size.chunk is None:
        return x @ params["head"]
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    rows = (x.reshape(-1, size.chunk, size.width), targets.reshape(-1, size.chunk))
    scored = jax.checkpoint(lambda x, targets: _losses(x @ params["head"], targets))
    losses = jax.lax.map(lambda pair: scored(*pair), rows).reshape(tokens.shape)
    return jnp.mean(losses[:, :-1])


def model(size: Size) -> Callable[[Any, Any], Any]:
    """`forward(params, tokens) -> logits`."""
    dense = lambda layer, name, x: x @ layer[name]  # noqa: E731
    return lambda params, tokens: run(dense, size, params, params["layers"], tokens)


def hand_written(size: Size) -> Callable[[Any, Any, Any], Any]:
    """`forward(factors, params, tokens) -> logits`, with adapters on every kernel of the layers."""

    def dense(layer, name, x):
        params, factors = layer
        a, b = factors[name]["a"], factors[name]["b"]
        return x @ params[name] + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

    return lambda factors, params, tokens: run(
        dense, size, params, (params["layers"], factors["layers"]), tokens
    )


def _losses(logits, targets):
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits.astype(jnp.float32), -1) - chosen.astype(jnp.float32)


def loss(output, tokens):
    """The mean loss of each token given those before it. An output that is a loss is returned."""
    return jnp.mean(_losses(output[:, :-1], tokens[:, 1:])) if output.ndim else output


# The sharding of each weight over a mesh of `data` by `model`, by the weight's name.

ALL = ("data", "model")
COLUMN, ROW = P(None, None, "model"), P(None, "model")
LAYOUTS: dict[str, dict[str, P]] = {
    # Every device has all weights, and a part of the batch.
    "data": {},
    # Every device has a part of every weight, and gathers the rest for each use.
    "fully sharded": {
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), P(None, ALL)),
        "embedding": P(None, ALL),
        "head": P(ALL),
    },
    # Every device has some heads and some hidden channels; two all-reduces a layer.
    "tensor": {
        **dict.fromkeys(("q", "k", "v", "gate", "up"), COLUMN),
        **dict.fromkeys(("o", "down", "embedding", "head"), ROW),
    },
}
BATCH = {"data": P(ALL), "fully sharded": P(ALL), "tensor": P("data")}


def on(mesh: Any, size: Size, layout: str, batch: tuple[int, int], rank: int) -> Model:
    """The model, plain and hand-written, with shapes on a mesh."""
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, LAYOUTS[layout].get(path[-1].key, P())),
        ),
        shapes(size),
    )
    tokens = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=NamedSharding(mesh, BATCH[layout]))
    return Model(model(size), hand_written(size), loss, placed, tokens, rank, where="layers/*")

"""Training steps to be timed: each work, with LoRA in it in every way that is compared.

A step is the loss, the gradient of the factors and Adam. A model is written once, and `linear`
says what stands at each of its adapted weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorax
from lorax.testing import random_factors
from models import attend, kernel, norm

HEADS = 8

Step = Callable[..., Any]


class Work(NamedTuple):
    """A model as a function of `linear`, the factors, the parameters and a batch."""

    forward: Callable[[Callable[..., jax.Array], Any, Any, jax.Array], jax.Array]
    params: Any
    batch: jax.Array
    rank: int


# The meanings of `linear`: without LoRA, with it, and with its products over [tokens, width].


def plain(_, w, x):
    return x @ w


def by_hand(f, w, x):
    return x @ w + (x @ f["a"]) @ f["b"]


def by_hand_flat(f, w, x):
    delta = (x.reshape(-1, x.shape[-1]) @ f["a"]) @ f["b"]
    return x @ w + delta.reshape(*x.shape[:-1], -1)


# The works


def _block(linear, f, p, x):
    h = norm(p["norm1"], x)
    q, k, v = (linear(f[name], p[name], h) for name in "qkv")
    x = x + linear(f["o"], p["o"], attend(q, k, v, HEADS))
    h = norm(p["norm2"], x)
    return x + linear(f["down"], p["down"], jax.nn.gelu(linear(f["up"], p["up"], h)))


def _init_block(key, width):
    shapes = {name: (width, width) for name in "qkvo"}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    keys = jax.random.split(key, len(shapes))
    params = {name: kernel(k, *shapes[name]) for name, k in zip(shapes, keys, strict=True)}
    return params | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}


def gpt(scan=False, remat=False, layers=6, width=512, batch=4, time=128, rank=16) -> Work:
    """The blocks of a GPT, every linear adapted."""

    def forward(linear, factors, params, x):
        def run(x, layer):
            return _block(linear, *layer, x), None

        run = jax.checkpoint(run) if remat else run
        if scan:
            return jax.lax.scan(run, x, (factors, params))[0]
        for layer in zip(factors, params, strict=True):
            x, _ = run(x, layer)
        return x

    blocks = [_init_block(key, width) for key in jax.random.split(jax.random.key(0), layers)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks) if scan else blocks
    return Work(forward, params, jax.random.normal(jax.random.key(1), (batch, time, width)), rank)


def mlp(layers=30, width=1000, batch=256, rank=64) -> Work:
    """Linear layers with a bias and ReLU."""

    def forward(linear, factors, params, x):
        for f, p in zip(factors, params, strict=True):
            x = jax.nn.relu(linear(f["kernel"], p["kernel"], x) + p["bias"])
        return x

    keys = jax.random.split(jax.random.key(0), layers)
    # ReLU halves the square of what it sees: without the factor, nothing is left at the end.
    kernels = [2**0.5 * kernel(key, width, width) for key in keys]
    params = [{"kernel": w, "bias": jnp.zeros(width)} for w in kernels]
    return Work(forward, params, jax.random.normal(jax.random.key(1), (batch, width)), rank)


WORKS: dict[str, Callable[[], Work]] = {
    "GPT": gpt,
    "GPT scanned": lambda: gpt(scan=True),
    "GPT scanned, remat": lambda: gpt(scan=True, remat=True),
    "MLP": mlp,
}


# The steps


def steps(work: Work) -> dict[str, tuple[Step, Any]]:
    """Each variant of a work's training step, with its arguments.

    The floor trains nothing: the frozen model's loss, and its gradient down to the batch.
    """
    forward, params, batch, rank = work
    no_factors = jax.tree.map(lambda _: None, params)

    def model(params, x):
        return forward(plain, no_factors, params, x)

    spec = lorax.infer_spec(model, params, batch, rank=rank)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
    # Random, since fresh factors have `b = 0`; small, so that many layers stay tame.
    tunable = jax.tree.map(lambda leaf: leaf / 8, random_factors(tunable, jax.random.key(3)))
    factors = as_dicts(tunable)
    adapted = lorax.lora(model)

    def ours(tunable, frozen, x):
        return adapted((frozen, tunable), x)

    def written(linear):
        return lambda factors, params, x: forward(linear, factors, params, x)

    def floor(params, x):
        return jax.value_and_grad(lambda x: jnp.mean(model(params, x) ** 2))(x)

    return {
        "ours": (train(ours), (start(tunable), frozen, batch)),
        "by hand": (train(written(by_hand)), (start(factors), params, batch)),
        "by hand again": (train(written(by_hand)), (start(factors), params, batch)),
        "by hand, flat": (train(written(by_hand_flat)), (start(factors), params, batch)),
        "floor": (floor, (params, batch)),
        "full fine-tuning": (train(lambda p, _, x: model(p, x)), (start(params), None, batch)),
    }


def as_dicts(tunable: Any) -> Any:
    """The factors as `{"a": …, "b": …}` in the place of every adapted weight."""
    return jax.tree.map(
        lambda weight: {"a": weight.a, "b": weight.b},
        tunable,
        is_leaf=lambda node: isinstance(node, lorax.LoraWeight),
    )


class State(NamedTuple):
    """Factors and their first and second moments."""

    factors: Any
    mean: Any
    square: Any


def start(factors: Any) -> State:
    """Before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, factors)
    return State(factors, zeros, zeros)


def train(apply: Callable[..., jax.Array]) -> Step:
    """One step of Adam on the mean square of what `apply` returns."""

    def step(state, frozen, x):
        def loss(factors):
            return jnp.mean(apply(factors, frozen, x) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.factors)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, state.square, gradient)
        factors = jax.tree.map(
            lambda f, m, s: f - 1e-4 * m / (jnp.sqrt(s) + 1e-8), state.factors, mean, square
        )
        return value, State(factors, mean, square)

    return step

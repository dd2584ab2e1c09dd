"""A training step: the loss, its gradient with respect to the factors, and Adam."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import Model


class NotCompared(Exception):
    """Our own reason to leave a library out of the table, as opposed to one of its errors."""


class State(NamedTuple):
    """Factors, and their first and second moments."""

    factors: Any
    mean: Any
    square: Any


def start(factors: Any) -> State:
    """The state before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, factors)
    return State(factors, zeros, zeros)


def objective(out: jax.Array) -> jax.Array:
    """The mean of fourth powers. The mean of squares would be constant after a layer norm."""
    return jnp.mean((out * out) ** 2)


class Trained(NamedTuple):
    """A step of (state, frozen, batch), and the loss that it differentiates."""

    step: Callable[..., tuple[jax.Array, State]]
    loss: Callable[..., jax.Array]


def train(apply: Callable[..., jax.Array]) -> Trained:
    """The training step of `apply(factors, frozen, batch)`."""

    def loss(factors, frozen, x):
        return objective(apply(factors, frozen, x))

    def step(state, frozen, x):
        value, gradient = jax.value_and_grad(loss)(state.factors, frozen, x)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, state.square, gradient)
        factors = jax.tree.map(
            lambda f, m, s: f - 1e-4 * m / (jnp.sqrt(s) + 1e-8), state.factors, mean, square
        )
        return value, State(factors, mean, square)

    return Trained(step, loss)


def floor(model: Model) -> tuple[Callable[..., Any], list[tuple[Any, ...]], Callable[..., Any]]:
    """A lower bound for any LoRA: the frozen model, and its gradient with respect to the input.

    Tokens have no gradient. For them, it is the gradient of the parameter `model.bottom`.
    """
    lowest = model.batch if model.bottom is None else model.bottom.get(model.params)

    def loss(lowest, params, batch):
        if model.bottom is None:
            return objective(model.apply(params, lowest))
        return objective(model.apply(model.bottom.replace(params, lowest), batch))

    return jax.value_and_grad(loss), [(lowest, model.params, model.batch)], loss

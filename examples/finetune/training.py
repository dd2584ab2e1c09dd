"""Training and prediction with a margin: the difference between the logits of two answers.

A margin is a function `margin(tunable, frozen, tokens, last) -> [batch]`. Nothing in this file is
specific to adapters: gradients and optimizer state are those of `tunable`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import batches
from display import steps_bar

TRAIN_BATCH, EVAL_BATCH = 16, 40


class Curve(NamedTuple):
    """The loss and accuracy of each step on its own sentences, before the update."""

    losses: list[float]
    accuracies: list[float]


def train(margin, tunable, frozen, prompts, positive, learning_rate, seed):
    """One pass of Adam over the prompts; returns the trained tree and the `Curve`."""
    steps = batches(prompts, TRAIN_BATCH)
    steps = [steps[i] for i in np.random.default_rng(seed).permutation(len(steps))]
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, len(steps)))

    def loss(tunable, frozen, tokens, last, sign):
        # The cross-entropy between two answers is the softplus of the wrong answer's margin.
        correct = sign * margin(tunable, frozen, tokens, last)
        return jnp.mean(jax.nn.softplus(-correct)), jnp.mean(correct > 0)

    @jax.jit
    def step(tunable, state, frozen, *batch):
        loss_and_accuracy, gradient = jax.value_and_grad(loss, has_aux=True)(
            tunable, frozen, *batch
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(tunable, updates), state, loss_and_accuracy

    state = optimizer.init(tunable)
    curve = Curve([], [])
    with steps_bar("Train", len(steps)) as advance:
        for rows, tokens, last in steps:
            sign = np.where(positive[rows], 1.0, -1.0).astype(np.float32)
            tunable, state, loss_and_accuracy = step(tunable, state, frozen, tokens, last, sign)
            for values, value in zip(curve, loss_and_accuracy, strict=True):
                values.append(float(value))
            advance(f"loss {np.mean(curve.losses[-10:]):.3f}")
    return tunable, curve


def predict(function, tunable, frozen, prompts, label):
    """The outputs of `function`, which has the arguments of a margin, for every prompt."""
    steps = batches(prompts, EVAL_BATCH)
    outputs = []
    with steps_bar(label, len(steps)) as advance:
        for rows, tokens, last in steps:
            outputs.append(np.asarray(function(tunable, frozen, tokens, last))[: len(rows)])
            advance()
    order = np.concatenate([rows for rows, _, _ in steps])
    return np.concatenate(outputs)[np.argsort(order)]

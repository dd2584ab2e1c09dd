"""Training and prediction with a margin: the logit of one answer less that of the other.

A margin is a function `margin(tunable, frozen, tokens, last) -> [batch]`. That the two trees are an
adapter and its base is not known here: gradients and optimizer state are those of `tunable`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import batches
from display import steps_bar

TRAIN_BATCH, EVAL_BATCH = 16, 40


def train(margin, tunable, frozen, prompts, positive, learning_rate, seed):
    """One pass of Adam over the prompts; returns the trained tree and the loss of every step."""
    steps = batches(prompts, TRAIN_BATCH)
    steps = [steps[i] for i in np.random.default_rng(seed).permutation(len(steps))]
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, len(steps)))

    def loss(tunable, frozen, tokens, last, sign):
        # Cross-entropy between two answers is the softplus of the margin of the wrong one.
        return jnp.mean(jax.nn.softplus(-sign * margin(tunable, frozen, tokens, last)))

    @jax.jit
    def step(tunable, state, frozen, *batch):
        value, gradient = jax.value_and_grad(loss)(tunable, frozen, *batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(tunable, updates), state, value

    state = optimizer.init(tunable)
    losses = []
    with steps_bar("Train", len(steps)) as advance:
        for rows, tokens, last in steps:
            sign = np.where(positive[rows], 1.0, -1.0).astype(np.float32)
            tunable, state, value = step(tunable, state, frozen, tokens, last, sign)
            losses.append(float(value))
            advance(f"loss {np.mean(losses[-10:]):.3f}")
    return tunable, losses


def predict(function, tunable, frozen, prompts, label):
    """What `function`, called as a margin is, gives for every prompt."""
    steps = batches(prompts, EVAL_BATCH)
    outputs = []
    with steps_bar(label, len(steps)) as advance:
        for rows, tokens, last in steps:
            outputs.append(np.asarray(function(tunable, frozen, tokens, last))[: len(rows)])
            advance()
    order = np.concatenate([rows for rows, _, _ in steps])
    return np.concatenate(outputs)[np.argsort(order)]

"""What every framework's tests share: the proof of an adapter."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import testing

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for what several of them read
# For the meshes; it must be set before the first array exists.
jax.config.update("jax_num_cpu_devices", 8)
# These models are small and run a few times: their compilation is what takes the time.
jax.config.update("jax_disable_most_optimizations", True)


def first(out):
    """The model's output, where it returns state beside it."""
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def prove():
    """`prove(fn, params, spec, *args)`: the adapter is right, trains, and merges.

    `fn` takes the parameters first and returns its output, or a tuple that begins with it.
    `transforms=True` proves `vmap`, `checkpoint` and `scan` around it too: one model of each
    framework has it.
    """

    def prove(fn, params, spec, *args, tolerance=None, transforms=False, **kwargs):
        testing.check(fn, params, spec, *args, tolerance=tolerance, transforms=transforms, **kwargs)
        adapted = lorax.lora(fn, on_materialize="error", on_unused="error")
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(5))
        before = [np.asarray(leaf) for leaf in _arrays(frozen)]

        plain = jax.jit(lambda params, args: first(fn(params, *args, **kwargs)))
        split = jax.jit(lambda pair, args: first(adapted(pair, *args, **kwargs)))
        _close(split((frozen, tunable), args), plain(params, args))

        tunable, losses = train(split, frozen, tunable, args)
        assert losses[-1] < 0.98 * losses[0], losses
        for leaf, was in zip(_arrays(frozen), before, strict=True):
            np.testing.assert_array_equal(leaf, was)

        merged = lorax.merge_params(frozen, tunable)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        _close(split((frozen, tunable), args), plain(merged, args))
        return frozen, tunable

    return prove


def train(split, frozen, tunable, args, steps=8):
    """A few steps towards an output of one everywhere."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @jax.jit
    def step(tunable, state):
        loss = lambda tunable: jnp.mean((split((frozen, tunable), args) - 1) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(tunable)
        updates, state = optimizer.update(grads, state, tunable)
        return optax.apply_updates(tunable, updates), state, value

    state, losses = optimizer.init(tunable), []
    for _ in range(steps):
        tunable, state, value = step(tunable, state)
        losses.append(float(value))
    return tunable, losses


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _close(ours, plain):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())

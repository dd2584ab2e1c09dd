"""Checks shared by the tests of all frameworks."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import testing

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for modules that several tests import
# For the meshes; it must be set before the first array exists.
jax.config.update("jax_num_cpu_devices", 8)
# These models are small and run only a few times, so compilation dominates.
jax.config.update("jax_disable_most_optimizations", True)


def output_of(result):
    """The model's output, without the state that it may also return."""
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def check_adapter():
    """`check_adapter(fn, params, spec, *args)`: an adapter is correct, trains and merges.

    `fn` takes the parameters first and returns its output, or a tuple that begins with it.
    `transforms=True` also checks `vmap`, `checkpoint` and `scan`; it is set for one model of each
    framework.
    """

    def check_adapter(fn, params, spec, *args, tolerance=None, transforms=False, **kwargs):
        testing.check(fn, params, spec, *args, tolerance=tolerance, transforms=transforms, **kwargs)
        adapted = lorax.lora(fn, on_materialize="error", on_unused="error")
        frozen, tunable = lorax.init_lora(params, spec, jax.random.key(5))
        before = [np.asarray(leaf) for leaf in _arrays(frozen)]

        plain = jax.jit(lambda params, args: output_of(fn(params, *args, **kwargs)))
        split = jax.jit(lambda pair, args: output_of(adapted(pair, *args, **kwargs)))
        _assert_close(split((frozen, tunable), args), plain(params, args))

        tunable, losses = train(split, frozen, tunable, args)
        assert losses[-1] < 0.98 * losses[0], losses
        for leaf, initial in zip(_arrays(frozen), before, strict=True):
            np.testing.assert_array_equal(leaf, initial)

        merged = lorax.merge_params(frozen, tunable)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        _assert_close(split((frozen, tunable), args), plain(merged, args))
        return frozen, tunable

    return check_adapter


def train(split, frozen, tunable, args, steps=8):
    """A few steps toward an output of one everywhere."""
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


def _assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

"""The line that a warning names is the user's, even where a library makes the equation."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lorax import MaterializeWarning, _uses, init_lora, lora

PARAMS, X = {"w": jnp.ones((5, 7)), "v": jnp.ones((5, 7))}, jnp.ones((3, 5))


def warned_lines(fn):
    """(parameter, line within `fn`) of every warning, in order."""
    pair = init_lora(PARAMS, {"w": 2, "v": 2}, jax.random.key(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MaterializeWarning)
        jax.jit(lora(fn, on_unused="allow"))(pair, X)
    first = inspect.getsourcelines(fn)[1]
    matches = [re.match(rf"`(\w)` .* at {__file__}:(\d+)", str(w.message)) for w in caught]
    assert matches and all(matches), [str(w.message) for w in caught]
    return [(match[1], int(match[2]) - first) for match in matches if match]


# Each of these functions uses `jit` inside, or makes several equations.
FUNCTIONS = {
    "where": lambda w: jnp.where(w != 0, w, 1.0),
    "clip": lambda w: jnp.clip(w, -1, 1),
    "norm": lambda w: w / jnp.linalg.norm(w, ord=1),
    "softmax": jax.nn.softmax,
    "gelu": jax.nn.gelu,
    "sort": jnp.sort,
    "median": lambda w: w - jnp.median(w),
    "quantile": lambda w: w - jnp.quantile(w, 0.3),
    "nan_to_num": jnp.nan_to_num,
    "round": jnp.round,
    "logsumexp": lambda w: w - jax.nn.logsumexp(w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_library_function_gets_the_line_of_its_caller(name):
    change = FUNCTIONS[name]
    jax.jit(change)(X)  # JAX has traced the function elsewhere

    def fn(params, x):
        first = change(params["w"])
        second = change(params["v"])
        return x @ first + x @ second

    expected = {("w", 1), ("v", 2)}
    if change.__module__ == __name__:  # The innermost line of the user is that of the lambda.
        line = inspect.getsourcelines(change)[1] - inspect.getsourcelines(fn)[1]
        expected = {("w", line), ("v", line)}
    assert set(warned_lines(fn)) == expected


def test_each_caller_of_one_body_gets_its_own_line():
    def fn(params, x):
        first = jnp.clip(params["w"], -1, 1)
        return x @ first + x @ jnp.clip(params["v"], -1, 1)

    assert warned_lines(fn) == [("w", 1), ("v", 2)]


def test_line_inside_the_users_jitted_function_is_named():
    @jax.jit
    def own(w):
        return jnp.clip(w, -1, 1)

    def fn(params, x):
        return x @ own(params["w"]) + x @ own(params["v"])

    line = inspect.getsourcelines(own)[1] + 2 - inspect.getsourcelines(fn)[1]
    assert warned_lines(fn) == [("w", line), ("v", line)]


BODIES = {
    "scan": lambda body, w, x: lax.scan(lambda c, x: (c, body(w, x)), 0, x[None])[1],
    "while": lambda body, w, x: lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, body(w, x)), (0, jnp.zeros((3, 7)))),
    "cond": lambda body, w, x: lax.cond(x.sum() > 0, lambda: body(w, x), lambda: -x @ w),
    "remat": lambda body, w, x: jax.checkpoint(body)(w, x),
    "jit-in-scan": lambda body, w, x: lax.scan(
        lambda c, x: (c, jax.jit(body)(w, x)), 0, x[None])[1],
    "vmap": lambda body, w, x: jax.vmap(body, (None, 0))(w, x),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_line_inside_a_body_is_named(name):
    def body(w, x):
        return x @ jnp.clip(w, -1, 1)

    def fn(params, x):
        return BODIES[name](body, params["w"], x)

    line = inspect.getsourcelines(body)[1] + 1 - inspect.getsourcelines(fn)[1]
    assert warned_lines(fn) == [("w", line)]


@pytest.mark.parametrize("shape, shown", [((np.int64(3), 5), "(3, 5)"), ((np.int64(3),), "(3,)")])
def test_shapes_print_as_numbers(shape, shown):
    use = _uses.Use("w", "materialized", "sin", shape, "model.py:1 (fn)")
    with pytest.warns(MaterializeWarning, match=re.escape(f"an array of shape {shown} at")):
        _uses.announce(["w"], [use], "warn", "warn")

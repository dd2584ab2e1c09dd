"""How a module of each framework becomes a function of its parameters."""

from collections.abc import Callable
from typing import Any

import jax

from .catalog import Subject

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """An input."""
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(below: int, *shape: int) -> jax.Array:
    """Token ids."""
    return jax.random.randint(jax.random.key(1), shape, 0, below)


def equinox(module: Any, call: Callable[..., Any], *args: Any) -> Subject:
    """The floating-point arrays of a module of Equinox; all else is the model's own."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Subject(lambda params, *args: call(eqx.combine(params, static), *args), params, args)


def nnx(module: Any, call: Callable[..., Any], *args: Any) -> Subject:
    """The `nnx.Param`s of a module of Flax NNX; other variables are constants."""
    from flax import nnx as flax_nnx

    graph, params, rest = flax_nnx.split(module, flax_nnx.Param, ...)

    def fn(params: Any, *args: Any) -> Any:
        # A module may count the random keys that it takes, in its own variables.
        fresh = jax.tree.map(lambda leaf: leaf, rest)
        return call(flax_nnx.merge(graph, params, fresh), *args)

    return Subject(fn, params, args)


def linen(module: Any, *args: Any, **options: Any) -> Subject:
    """The collection "params" of a module of Flax Linen; other collections are constants.

    What the module does to those is lost.
    """
    variables = dict(module.init(KEY, *args, **options))
    params = variables.pop("params")

    def fn(params: Any, *args: Any) -> Any:
        every = {"params": params, **variables}
        return module.apply(every, *args, **options, mutable=list(variables))[0]

    return Subject(fn, params, args)


def haiku(forward: Callable[..., Any], *args: Any, **options: Any) -> Subject:
    """A function that makes modules of Haiku; their state is a constant.

    The options are for the call that makes the parameters alone.
    """
    import haiku as hk

    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, *args, **options)

    def fn(params: Any, *args: Any) -> Any:
        return model.apply(params, state, KEY, *args)[0]

    return Subject(fn, params, args)


def keras(model: Any, *args: Any) -> Subject:
    """The trainable variables of a model of Keras, each under its path."""
    paths = [variable.path for variable in model.trainable_variables]
    params = {v.path: v.value for v in model.trainable_variables}
    state = [variable.value for variable in model.non_trainable_variables]

    def fn(params: Any, *args: Any) -> Any:
        trainable = [params[path] for path in paths]
        return model.stateless_call(trainable, state, *args, training=False)[0]

    return Subject(fn, params, args)

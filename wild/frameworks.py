"""Converts the modules of each framework to functions of their parameters."""

from collections.abc import Callable
from typing import Any

import jax

from .catalog import Subject

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """A random input."""
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(below: int, *shape: int) -> jax.Array:
    """Random token ids."""
    return jax.random.randint(jax.random.key(1), shape, 0, below)


def equinox(module: Any, call: Callable[..., Any], *args: Any) -> Subject:
    """An Equinox module; its floating-point arrays are the parameters."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Subject(lambda params, *args: call(eqx.combine(params, static), *args), params, args)


def nnx(module: Any, call: Callable[..., Any], *args: Any) -> Subject:
    """An NNX module; its `nnx.Param`s are the parameters, and other variables are constants."""
    from flax import nnx as flax_nnx

    graph, params, rest = flax_nnx.split(module, flax_nnx.Param, ...)

    def fn(params: Any, *args: Any) -> Any:
        # A call may change the module's variables, such as its count of random keys.
        fresh = jax.tree.map(lambda leaf: leaf, rest)
        return call(flax_nnx.merge(graph, params, fresh), *args)

    return Subject(fn, params, args)


def linen(module: Any, *args: Any, **options: Any) -> Subject:
    """A Linen module; other collections than "params" are constants, and their updates are lost."""
    variables = dict(module.init(KEY, *args, **options))
    params = variables.pop("params")

    def fn(params: Any, *args: Any) -> Any:
        collections = {"params": params, **variables}
        return module.apply(collections, *args, **options, mutable=list(variables))[0]

    return Subject(fn, params, args)


def haiku(forward: Callable[..., Any], *args: Any, **options: Any) -> Subject:
    """A function that uses Haiku modules; their state is a constant.

    The options are passed only to the call that initializes the parameters.
    """
    import haiku as hk

    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, *args, **options)

    def fn(params: Any, *args: Any) -> Any:
        return model.apply(params, state, KEY, *args)[0]

    return Subject(fn, params, args)


def keras(model: Any, *args: Any) -> Subject:
    """A Keras model; its trainable variables are the parameters, by path."""
    paths = [variable.path for variable in model.trainable_variables]
    params = {v.path: v.value for v in model.trainable_variables}
    state = [variable.value for variable in model.non_trainable_variables]

    def fn(params: Any, *args: Any) -> Any:
        trainable = [params[path] for path in paths]
        return model.stateless_call(trainable, state, *args, training=False)[0]

    return Subject(fn, params, args)

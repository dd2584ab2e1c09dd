"""Equations that read a weight that is stored as codes, which is an array only inside them.

Under `jax.checkpoint`, such an equation saves the codes for the backward pass and nothing that was
computed from them. A barrier keeps compilers from decoding a weight before it is needed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from . import _compat
from ._coded import array_of, is_coded


def evaluate(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluates an equation on arrays, some of which are decoded for it alone."""
    if eqn.effects:
        # `jax.checkpoint` does not take every effect, so nothing is recomputed here.
        return _compat.bind(eqn, *map(array_of, operands))
    leaves, structure = jax.tree.flatten(tuple(map(_unnamed, operands)))
    params = tuple(eqn.params.items())
    try:
        function = _consumer(eqn.primitive, params, structure)
    except TypeError:  # a parameter that cannot be hashed
        function = _consumer.__wrapped__(eqn.primitive, params, structure)
    return function(*leaves)


@functools.lru_cache(maxsize=4096)
def _consumer(primitive: Any, params: Any, structure: Any) -> Callable[..., list[Any]]:
    """Returns one function for all equal equations, so that JAX traces it once."""

    def function(*operands: Any) -> list[Any]:
        return _compat.bind_params(primitive, dict(params), *map(array_of, operands))

    return _recomputed(function, f"{primitive.name}_of_codes", structure)


def reading(function: Callable[..., Any], *operands: Any) -> Any:
    """Evaluates `function(*arrays)`; with a coded operand, the backward pass recomputes it."""
    if not any(map(is_coded, operands)):
        return function(*operands)
    leaves, structure = jax.tree.flatten(tuple(map(_unnamed, operands)))
    called = lambda *operands: function(*map(array_of, operands))  # noqa: E731
    return _recomputed(called, "of_codes", structure)(*leaves)


def decoded(value: Any) -> jax.Array:
    """Returns the array of a base or of a whole weight; the backward pass decodes codes again."""
    if not is_coded(getattr(value, "base", value)):
        return array_of(value)
    leaves, structure = jax.tree.flatten(value.unnamed())
    return _decoder(structure)(*leaves)


@functools.lru_cache(maxsize=4096)
def _decoder(structure: Any) -> Callable[..., jax.Array]:
    return _recomputed(array_of, "decoded", structure, several=False)


def _unnamed(operand: Any) -> Any:
    return operand.unnamed() if hasattr(operand, "unnamed") else operand


def _recomputed(
    function: Callable[..., Any], name: str, structure: Any, several: bool = True
) -> Callable[..., Any]:
    def flat(*leaves: Any) -> Any:
        operands = jax.tree.unflatten(structure, _behind_barrier(leaves))
        if not several:
            return function(operands)
        if not any(is_coded(operand) and operand.is_packed for operand in operands):
            # A product converts whole bytes as it reads them. XLA then fuses it with the equation
            # that computes the other operand, if that one is taken from before the barrier.
            before = jax.tree.unflatten(structure, leaves)
            pairs = zip(before, operands, strict=True)
            operands = [behind if is_coded(behind) else ahead for ahead, behind in pairs]
        return function(*operands)

    flat.__name__ = flat.__qualname__ = name
    nothing = jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(flat, prevent_cse=True, policy=nothing)


def _behind_barrier(leaves: Sequence[Any]) -> list[Any]:
    """The same leaves behind one barrier, except for scalars, such as indices.

    Codes are available from the start: without the barrier, a compiler may decode all weights at
    once.
    """
    arrays = iter(jax.lax.optimization_barrier([leaf for leaf in leaves if jnp.ndim(leaf) > 0]))
    return [next(arrays) if jnp.ndim(leaf) > 0 else leaf for leaf in leaves]

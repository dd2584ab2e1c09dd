"""From a pair back to plain parameters, and the other way."""

import functools
from typing import Any

import jax

from ._compat import is_tracer
from ._errors import PairError
from ._pair import combine, flatten_pair, flatten_params, has_adapters, is_tunable_leaf
from ._weight import LoraWeight, factored


def materialize(base: jax.Array, weight: LoraWeight) -> jax.Array:
    """One weight in full: `base + scale · a @ b`.

    Summed in float32, or in the base's dtype where that is wider, and then cast to the base's.

    Args:
        base: the frozen weight, of any shape `weight` fits.
        weight: its adapter.

    Returns:
        An array with the shape and dtype of `base`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import LoraWeight, materialize
        >>> weight = LoraWeight(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), rank=1)
        >>> materialize(jnp.eye(2), weight).tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """
    return factored(base, weight).array()


def _subtract(base: jax.Array, weight: LoraWeight) -> jax.Array:
    value = factored(base, weight)
    return value.replace_terms(term.scale(-1) for term in value.terms).array()


@functools.lru_cache(maxsize=256)
def _compiled(function: Any, sharding: Any, donate: bool) -> Any:
    return jax.jit(function, out_shardings=sharding, donate_argnums=(0,) if donate else ())


def _apply(function: Any, base: Any, weight: LoraWeight, donate: bool = False) -> jax.Array:
    if not isinstance(base, jax.Array) or any(map(is_tracer, (base, weight.a, weight.b))):
        return function(base, weight)
    # Compiled: no copy of the weight in float32 and none of the delta outlive the sum.
    return _compiled(function, base.sharding, donate)(base, weight)


# What a call without the second tree has in its place; None is a tree, too.
_ABSENT: Any = object()


def merge_params(frozen: Any, tunable: Any = _ABSENT, *, donate: bool = False) -> Any:
    """Plain parameters for the untransformed model: `base + scale · a @ b` for every adapter.

    Summed in float32, or in the base's dtype where that is wider, and then cast to the base's.
    Parameters without an adapter are returned as they are, not copied. Sharded weights stay
    sharded as they were; the function also runs under `jax.jit`.

    Args:
        frozen: the frozen tree of the pair.
        tunable: the tunable tree of the pair.
        donate: whether the memory of adapted base weights may be reused. They are unusable
            afterwards, and the peak is one weight lower.

    Returns:
        A tree with the structure of the parameters.

    Raises:
        PairError: where the two trees are no pair.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, merge_params
        >>> params = {"w": jnp.eye(3)}
        >>> frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
        >>> merged = merge_params(frozen, tunable)
        >>> bool((merged["w"] == params["w"]).all())  # b is zero at first
        True
    """
    if tunable is _ABSENT:
        raise PairError(
            "merge_params takes the two trees of a pair, not the pair: merge_params(*pair)."
        )
    leaves, structure = flatten_pair(frozen, tunable, "merge_params")
    return combine(
        leaves, structure, lambda leaf: _apply(materialize, leaf.frozen, leaf.tunable, donate)
    )


def unmerge(params: Any, tunable: Any) -> Any:
    """The frozen tree whose merge with `tunable` gave `params`: `merged − scale · a @ b`.

    Exact up to the rounding of the base's dtype: what a merge into bfloat16 has rounded away
    does not come back. Keep the frozen tree where you can.

    Args:
        params: merged parameters.
        tunable: the tunable tree that was merged into them.

    Returns:
        The frozen tree: None where `tunable` has a full parameter.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, merge_params, unmerge
        >>> frozen, tunable = init_lora({"w": jnp.eye(3)}, {"w": 2}, jax.random.key(0))
        >>> merged = merge_params(frozen, tunable)
        >>> bool(jnp.allclose(unmerge(merged, tunable)["w"], frozen["w"]))
        True
    """
    if has_adapters(params):
        raise PairError(
            "unmerge: the first tree has adapters; it takes merged parameters, and then tunable."
        )
    leaves, structure = flatten_params(params)
    news, other = jax.tree.flatten(tunable, is_leaf=is_tunable_leaf)
    if structure != other:
        raise PairError("unmerge: params and tunable must have the same structure.")
    return jax.tree.unflatten(
        structure,
        [
            _apply(_subtract, leaf, new)
            if isinstance(new, LoraWeight)
            else (leaf if new is None else None)
            for (_, leaf), new in zip(leaves, news, strict=True)
        ],
    )


def count_params(tree: Any) -> int:
    """How many numbers the arrays of a tree hold: `count_params(tunable)` is what is trained.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import count_params, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((30, 20))}, {"w": 2}, jax.random.key(0))
        >>> count_params(frozen), count_params(tunable)
        (600, 100)
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))

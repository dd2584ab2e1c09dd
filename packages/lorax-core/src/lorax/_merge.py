"""Merges a pair into plain parameters, and removes an adapter from merged ones."""

import functools
import itertools
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adapter import Adapter
from ._arrays import Encoded, own
from ._base import QuantizedWeight, as_base, check_finite, decoded, encoded, first_array
from ._compat import is_tracer
from ._contract import wide_dtype
from ._errors import ArgumentError, PairError
from ._frozen_weight import FrozenWeight, base_and_frozen_factors
from ._pair import (
    ABSENT,
    Leaf,
    check_leaf_of_pair,
    combine,
    flatten_pair,
    flatten_params,
    flatten_tunable,
    has_adapters,
    layout_on,
    two_trees,
)
from ._sharding import devices_of, in_device_memory, placement


def materialize(base: jax.Array | FrozenWeight, weight: Adapter) -> jax.Array:
    """Returns one materialized weight: `base + scale · a @ b` for LoRA.

    The sum is computed in float32, or the base's dtype if that is wider, and cast to the latter.

    Args:
        base: the leaf of the frozen tree, of a shape that `weight` fits.
        weight: its adapter.

    Returns:
        An array with the shape and dtype of `base`.

    Raises:
        PairError: if the adapter does not fit the base.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, materialize
        >>> frozen, tunable = init_lora({"w": jnp.eye(2)}, {"w": 1}, jax.random.key(0))
        >>> trained = jax.tree.map(jnp.ones_like, tunable)
        >>> materialize(frozen["w"], trained["w"]).tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """
    given: Any = weight
    if not isinstance(given, Adapter):
        raise PairError(
            f"materialize takes a leaf of frozen and the adapter of the same path in tunable, not "
            f"{type(weight).__name__}. `merge_params` takes the trees."
        )
    base, factors = base_and_frozen_factors(base)
    check_leaf_of_pair("materialize", Leaf(".", base, weight, factors))
    return weight.applied(as_base(base), factors).array()


def _merged(base: Any, factors: Mapping[str, Any], weight: Adapter) -> jax.Array:
    return weight.applied(as_base(base), factors).array()


@functools.lru_cache(maxsize=256)  # One function per scale, so that it is compiled once.
def _merged_by(scale: float) -> Callable[..., jax.Array]:
    """Returns a function that merges `scale` times the change that an adapter makes."""
    if scale == 1:
        return _merged

    def merged(base: Any, factors: Mapping[str, Any], weight: Adapter) -> jax.Array:
        # In float32 or wider: a delta far below the base would be rounded away in bfloat16.
        wide = decoded(base).astype(wide_dtype(base.dtype))
        # A difference, because gains and turns also change the weight, not only deltas.
        change = weight.applied(wide, factors).array() - wide
        return (wide + scale * change).astype(base.dtype)

    return merged


def _unmerged(merged: jax.Array, factors: Mapping[str, Any], weight: Adapter) -> jax.Array:
    return weight.applied(merged, factors).removed()


@functools.lru_cache(maxsize=256)
def _compiled(function: Any, sharding: Any, donate: bool) -> Any:
    return jax.jit(function, out_shardings=sharding, donate_argnums=(0,) if donate else ())


def _apply(change: Any, function: str, leaf: Leaf, donate: bool = False) -> jax.Array:
    frozen, tunable, factors = leaf.frozen, leaf.tunable, dict(leaf.frozen_factors)
    # Any of them may be traced, or committed to some device.
    arrays = [first_array(frozen), *jax.tree.leaves((factors, tunable))]
    # Under a trace, the enclosing program is compiled, and placement is its own.
    if any(map(is_tracer, arrays)):
        return change(frozen, factors, tunable)
    _check_devices(function, leaf.path, arrays)
    base, factors, tunable = jax.tree.map(in_device_memory, (frozen, factors, tunable))
    sharding = placement(base)
    # An uncommitted base moves to the devices of its factors, as JAX does for `base + a @ b`.
    here = devices_of(first_array(base))
    elsewhere = [x for x in jax.tree.leaves((factors, tunable)) if devices_of(x) != here]
    stays = sharding is not None or not elsewhere
    # Only a buffer of JAX can be donated; NumPy arrays and codes cannot.
    donate = donate and isinstance(frozen, jax.Array)
    # Under jit, neither a float32 copy of the weight nor the delta outlives the sum.
    value = _compiled(change, sharding, donate and stays)(base, factors, tunable)
    # XLA could not reuse the buffer, as when dtypes differ: free it now.
    if donate and not frozen.is_deleted():
        frozen.delete()
    # Weights that are offloaded to the host are merged on the device and copied back.
    moved = first_array(base) is not first_array(frozen)
    return jax.device_put(value, frozen.sharding) if moved else value


def _check_devices(function: str, path: str, arrays: Sequence[Any]) -> None:
    """Raises for a weight whose factors are committed to other devices than its base."""
    base, *factors = (devices_of(array) if placement(array) else set() for array in arrays)
    for factor in factors:
        if base and factor and base != factor:
            raise PairError(
                f"{function}: the base at `{path}` is committed to {_brief(base)}, and its factors "
                f"are committed to {_brief(factor)}. Move one of them with `jax.device_put`."
            )


def _brief(devices: set[Any]) -> str:
    names = sorted(map(str, devices))
    return names[0] if len(names) == 1 else f"{len(names)} devices ({names[0]}, …, {names[-1]})"


class Requantized(NamedTuple):
    """Merged parameters in the format of their bases, and the rounding errors.

    Attributes:
        params: the parameters, each merged weight in the format of its base.
        errors: for each of these, by path, `‖quantized − merged‖ / ‖merged‖`; scalar arrays if the
            merge is traced.
    """

    params: Any
    errors: dict[str, Any]


def merge_params(
    frozen: Any,
    tunable: Any = ABSENT,
    *,
    scale: float = 1.0,
    donate: bool = False,
    requantize: bool = False,
) -> Any:
    """Returns plain parameters for the original model: `base + scale · a @ b` for every adapter.

    The sum is computed in float32, or the base's dtype if that is wider, and cast to the latter.
    Frozen parameters without an adapter are returned as they are; those of `tunable` are copied, so
    a training step may donate `tunable` and leave the result intact. Committed weights keep their
    sharding. Others move to the devices of their factors, and are uncommitted if these are. The
    function also works under `jax.jit`.

    Args:
        frozen: the frozen tree of the pair, or the whole `Pair`.
        tunable: the tunable tree of the pair.
        scale: multiplies the change that each adapter makes; 0 gives the base.
        donate: whether the memory of adapted base weights may be reused. They are deleted, and the
            peak memory is one weight lower. A weight that is at two paths is kept.
        requantize: whether quantized weights are quantized again after the merge. Rounding to codes
            loses some of the trained change; more of it if the change is small compared to the
            steps between codes. By default, all quantized weights are decoded.

    Returns:
        A tree with the structure of the parameters; with `requantize`, a `Requantized` of that tree
        and the rounding error of each requantized weight.

    Raises:
        PairError: if the two trees are not a pair; if a weight and its factors are committed
            to different devices; if the scale is not 1 and a parameter is fully trained, since
            its base is unknown.
        ArgumentError: if the scale is not a finite number, or `requantize` is not a bool.
        SpecError: with `requantize`, if a merged weight has entries that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import Int8, init_lora, merge_params, quantize
        >>> params = {"w": jnp.eye(3)}
        >>> frozen, tunable = init_lora(params, {"w": 2}, jax.random.key(0))
        >>> merged = merge_params(frozen, tunable)
        >>> bool((merged["w"] == params["w"]).all())  # b is initially zero
        True
        >>> quantized = quantize(frozen, {"w": Int8()})
        >>> {path: round(error, 4) for path, error in
        ...  merge_params(quantized, tunable, requantize=True).errors.items()}
        {'w': 0.0}
    """
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ArgumentError(f"merge_params: scale is {scale!r}; it must be a finite number.")
    given: Any = requantize
    if not isinstance(given, bool):
        raise ArgumentError(
            f"merge_params: requantize={given!r}; it must be a bool: each weight keeps the "
            "format of its base. For another format, call quantize on the merged parameters."
        )
    frozen, tunable = two_trees(frozen, tunable, "merge_params")
    leaves, structure = flatten_pair(frozen, tunable, "merge_params")
    in_full = [leaf.path for leaf in leaves if not leaf.is_adapted and leaf.tunable is not None]
    if in_full and scale != 1:
        raise PairError(
            f"merge_params: scale is {scale}, and `{in_full[0]}` is trained in full: its base is "
            "in neither tree, so its change cannot be scaled. Merge with scale=1, or set it to "
            "None in tunable and to its base in frozen."
        )
    uses = Counter(id(leaf.frozen) for leaf in leaves)

    def merged(leaf: Leaf) -> jax.Array:
        # A buffer that another path uses as well must not be donated.
        once = uses[id(leaf.frozen)] == 1
        return _apply(_merged_by(float(scale)), "merge_params", leaf, donate and once)

    def again(leaf: Leaf) -> Any:
        value = merged(leaf)
        if not isinstance(leaf.frozen, QuantizedWeight):
            return value
        check_finite(leaf.path, value)
        quantized = encoded(leaf.frozen, value)
        error = _distance(quantized, value)
        errors[leaf.path] = error if is_tracer(error) else float(error)
        return quantized

    # Fully trained parameters are copied, and quantized ones decoded unless they are kept.
    leaves = [
        leaf
        if leaf.is_adapted
        else leaf._replace(
            tunable=own(leaf.tunable), frozen=leaf.frozen if requantize else decoded(leaf.frozen)
        )
        for leaf in leaves
    ]
    errors: dict[str, Any] = {}
    if requantize:
        return Requantized(combine(leaves, structure, again), errors)
    return combine(leaves, structure, merged)


@jax.jit
def _distance(quantized: QuantizedWeight, array: jax.Array) -> jax.Array:
    """Returns `‖quantized − array‖ / ‖array‖`; zero for an array of zeros."""
    wide = wide_dtype(array.dtype)
    # Frobenius norms, in float32 or wider.
    norm = jnp.linalg.norm(array.astype(wide).ravel())
    error = jnp.linalg.norm((quantized.array().astype(wide) - array.astype(wide)).ravel())
    return error / jnp.where(norm > 0, norm, jnp.ones_like(norm))


def unmerge(params: Any, tunable: Any) -> Any:
    """Returns the frozen tree that was merged with `tunable`: `merged − scale · a @ b` for LoRA.

    This is exact up to rounding in the base's dtype: digits that a merge into bfloat16 has rounded
    away are not recovered. Keep the frozen tree if you can.

    Args:
        params: merged parameters.
        tunable: the tunable tree that was merged into them.

    Returns:
        The frozen tree, with None where `tunable` has a fully trained parameter.

    Raises:
        PairError: if the trees do not fit; if an adapter has frozen factors, such as the
            norms of DoRA, which merged parameters do not contain; if a weight is quantized.

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
    news, other = flatten_tunable(tunable, params, structure)
    if structure != other:
        raise PairError("unmerge: params and tunable must have the same structure.")
    for (path, leaf), new in zip(leaves, news, strict=True):
        if not isinstance(new, Adapter):
            continue
        if isinstance(leaf, QuantizedWeight):
            raise PairError(
                f"unmerge: `{path}` is quantized, and the rounding of its codes cannot be undone. "
                "Keep the frozen tree, or pass dequantize(params) for floats near the base's."
            )
        layout = layout_on(new, tuple(getattr(leaf, "shape", ())))
        if layout is None or not layout.frozen:
            check_leaf_of_pair("unmerge", Leaf(path, leaf, new))
        else:
            raise PairError(
                f"unmerge: the {new.kind} adapter at `{path}` has frozen factors, which merged "
                "parameters do not contain. Keep the frozen tree instead."
            )
    return jax.tree.unflatten(
        structure,
        [
            _apply(_unmerged, "unmerge", Leaf(path, leaf, new))
            if isinstance(new, Adapter)
            else (leaf if new is None else None)
            for (path, leaf), new in zip(leaves, news, strict=True)
        ],
    )


def count_params(tree: Any) -> int:
    """Returns how many numbers a tree holds: `count_params(tunable)` counts the trained ones.

    A quantized weight counts as many numbers as it represents.

    Args:
        tree: the parameters, or one of the trees of a pair.

    Returns:
        The number; leaves that are not arrays are not counted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import count_params, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((30, 20))}, {"w": 2}, jax.random.key(0))
        >>> count_params(frozen), count_params(tunable)
        (600, 100)
    """
    whole = lambda node: isinstance(node, Encoded | Adapter)  # noqa: E731
    leaves = jax.tree.leaves(tree, is_leaf=whole)
    # Only the factors of an adapter: a dropout key and the scale of a bank are not trained.
    several = (leaf.factors().values() if isinstance(leaf, Adapter) else (leaf,) for leaf in leaves)
    return sum(leaf.size for leaf in itertools.chain(*several) if hasattr(leaf, "size"))

"""`init_lora`: splits parameters into a pair with fresh adapters; and its named initializers."""

import math
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from ._adapter import Adapter
from ._adapter_spec import AdapterSpec, Initializer, Start, Started
from ._arrays import checked_key, own
from ._axes import Axes
from ._base import QuantizedWeight, encoded, first_array
from ._boxes import box_factors
from ._compat import is_tracer
from ._contract import holds_factors, wide_dtype
from ._errors import SpecError
from ._frozen_weight import FrozenWeight
from ._pair import Pair, flatten_params
from ._renamed import takes_old_names
from ._sharding import factor_sharding
from ._spec import LORA_FREEZE, LORA_FULL, check_leaf
from ._terms import Labels


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real, imaginary = jax.random.split(key)
        part = jnp.finfo(dtype).dtype
        return jax.lax.complex(_uniform(real, shape, part), _uniform(imaginary, shape, part))
    # The matrix is [fan_in, rank].
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / min(shape)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.nn.initializers.orthogonal()(key, shape, dtype)


INITIALIZERS: dict[str, Initializer] = {
    # The default of PEFT: kaiming_uniform with a=√5 is uniform in ±1/√fan_in.
    "uniform": _uniform,
    # PEFT's "gaussian": a standard deviation of 1/rank.
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "zeros": jax.nn.initializers.zeros,
}


@takes_old_names(param_tree="params", rng="key")
def init_lora(
    params: Any,
    spec: Any,
    key: jax.Array,
    *,
    a_init: str | Initializer = "uniform",
    b_init: str | Initializer = "zeros",
    dtype: Any = None,
    collected: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> Pair:
    """Splits parameters into a frozen tree and a tunable one with fresh factors.

    By default, `a` is uniform in ±1/√fan_in and `b` is zero, so the adapted model initially equals
    the base model. The key of each leaf is folded from its path, so adding a layer does not change
    the factors of others.

    Args:
        params: the parameters, any pytree; leaves that are not arrays are kept unchanged.
        spec: a tree of the same structure; each leaf is `LORA_FREEZE`, `LORA_FULL`, a rank, or
            the spec of a kind of adapter: `LoraSpec`, `DoraSpec`, ….
        key: a PRNG key, new style or old.
        a_init: the initializer of fan-in factors: "uniform", "gaussian", "orthogonal", "zeros", or
            a function `(key, shape, dtype) -> array` as in `jax.nn.initializers`. It is called for
            the matrix `[fan_in, rank]` of each entry of the shared axes.
        b_init: the initializer of fan-out factors, `[rank, fan_out]`; the same choices.
        dtype: the dtype of the factors; by default that of the base, or float32 if that is
            narrower.
        collected: the result of `collect_starts`, for specs whose `init` needs it.

    Returns:
        The `Pair` of `frozen` and `tunable`, both with the structure of `params`. Frozen leaves
        are the same buffers, not copies; `tunable` shares no buffer, so a training step may donate
        it. Factors are sharded like their base, axis by axis, and are uncommitted if it is. If Flax
        has boxed a base with its partition (`nn.Partitioned`), each factor gets a box with its own.
        Frozen factors of an adapter are in `frozen`, in a `FrozenWeight`.

    Raises:
        SpecError: if the spec does not fit the parameters; the message names the path.
        ArgumentError: if `key` is not a PRNG key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LORA_FREEZE, LORA_FULL, init_lora
        >>> params = {"w": jnp.ones((5, 3)), "scale": jnp.ones(3), "b": jnp.zeros(3)}
        >>> spec = {"w": 2, "scale": LORA_FREEZE, "b": LORA_FULL}
        >>> frozen, tunable = init_lora(params, spec, jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].b.shape, tunable["scale"], frozen["b"]
        ((5, 2), (2, 3), None, None)
    """
    key = checked_key(key, "init_lora")
    initializers = _initializer("a_init", a_init), _initializer("b_init", b_init)
    if dtype is not None and not holds_factors(dtype):
        raise SpecError(
            f"dtype={jnp.dtype(dtype)} cannot hold factors; use floats of 16 or more bits."
        )
    leaves, structure = flatten_params(params)
    specs = flatten_spec(spec, structure)
    # All leaves are validated before anything is drawn.
    checked = [
        check_leaf(path, leaf, leaf_spec)
        for (path, leaf), leaf_spec in zip(leaves, specs, strict=True)
    ]
    collected = {} if collected is None else collected
    _check_collected(collected, leaves, checked)
    common = _common(leaves, checked, key)
    placed: dict[Any, Any] = {}
    frozen: list[Any] = []
    tunable: list[Any] = []
    for (path, leaf), leaf_spec in zip(leaves, checked, strict=True):
        if isinstance(leaf_spec, tuple):
            kind, axes = leaf_spec
            # By path and not by position, so that keys do not change when layers are added.
            of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))
            wide = wide_dtype(leaf.dtype) if dtype is None else jnp.dtype(dtype)
            shared = common[kind.common_key]
            given = collected.get(path)
            start = Start(path, leaf, axes, of_path, wide, shared, initializers, given)
            base, weight = _placed(kind.start(start), leaf, placed)
            frozen.append(base)
            tunable.append(weight)
        else:
            frozen.append(leaf if leaf_spec == LORA_FREEZE else None)
            tunable.append(own(leaf) if leaf_spec == LORA_FULL else None)
    frozen_tree = jax.tree.unflatten(structure, frozen)
    tunable_tree = jax.tree.unflatten(structure, tunable)
    return Pair(frozen_tree, box_factors(tunable_tree, frozen_tree))


def _check_collected(collected: Mapping[str, Any], leaves: Any, checked: Any) -> None:
    """Raises for collected entries that no spec uses, instead of ignoring them."""
    # `eva_ranks` freezes a weight that gets no rank, and its entry stays.
    asking = {
        path
        for (path, _), spec in zip(leaves, checked, strict=True)
        if spec == LORA_FREEZE or (isinstance(spec, tuple) and spec[0].collects is not None)
    }
    if unused := sorted(collected.keys() - asking):
        raise SpecError(
            f"`collected` has `{unused[0]}`, whose spec has no `init` that takes it. Pass the "
            "parameters and the spec that `collect_starts` was given."
        )


def _common(leaves: Any, checked: Any, key: jax.Array) -> dict[Hashable, Any]:
    """Returns the values that weights with equal `common_key` share, by that key."""
    groups: dict[Hashable, tuple[AdapterSpec, list[tuple[tuple[int, ...], Axes]]]] = {}
    for (_, leaf), leaf_spec in zip(leaves, checked, strict=True):
        if isinstance(leaf_spec, tuple):
            kind, axes = leaf_spec
            _, weights = groups.setdefault(kind.common_key, (kind, []))
            weights.append((tuple(leaf.shape), axes))
    return {group: kind.common(weights, key) for group, (kind, weights) in groups.items()}


def _initializer(name: str, initializer: str | Initializer) -> Initializer:
    if callable(initializer):
        return initializer
    if initializer not in INITIALIZERS:
        known = ", ".join(repr(known) for known in INITIALIZERS)
        raise SpecError(
            f"{name}={initializer!r} is unknown; it must be one of {known}, or a function."
        )
    return INITIALIZERS[initializer]


def flatten_spec(spec: Any, structure: Any) -> list[Any]:
    """Returns the leaves of a spec tree, which must have the structure of the parameters."""
    is_leaf = lambda node: node is None or isinstance(node, AdapterSpec)  # noqa: E731
    leaves, other = jax.tree.flatten(spec, is_leaf=is_leaf)
    if other != structure:
        raise SpecError(
            "The spec must have the structure of the parameters. Parameters: "
            f"{structure}; spec: {other}. `simple_spec`, `spec_from_rules` and `infer_spec` make "
            "one that fits."
        )
    return leaves


def _placed(started: Started, base: Any, placed: dict[Any, Any]) -> tuple[Any, Adapter]:
    """Returns the frozen and the tunable leaf, with every factor placed like its base.

    `placed` caches moved arrays, so that a factor shared by several weights stays a single array.
    """
    adapter, frozen, moved = started
    layout = adapter.layout(tuple(base.shape))
    factors = adapter.factors()
    adapter = adapter.with_factors(
        {
            name: _place_like(factor, base, layout.out, layout.factors[name], {})
            for name, factor in factors.items()
        }
    )
    if moved is None:
        moved = base
    elif isinstance(base, QuantizedWeight):
        # The start has moved a quantized base: it is quantized again, in its own format.
        moved = encoded(base, moved)
    elif isinstance(moved, QuantizedWeight):
        pass  # It is placed as its base is.
    elif isinstance(base, jax.Array) and not is_tracer(base):
        moved = jax.device_put(moved, base.sharding)
    beside = {
        name: _place_like(factor, base, layout.out, layout.frozen[name], placed)
        for name, factor in frozen.items()
    }
    return FrozenWeight.beside(moved, beside, adapter), adapter


def _place_like(
    factor: Any, base: Any, out: tuple[Labels, ...], labels: Labels, placed: dict[Any, Any]
) -> Any:
    """Moves a factor to the devices of its base, each axis sharded like the base's axis."""
    # NumPy arrays and shapes are not placed anywhere.
    if not isinstance(first_array(base), jax.Array):
        return factor
    if is_tracer(first_array(base)):
        quantized = isinstance(base, QuantizedWeight)
        # A quantized base derives its sharding from that of its codes.
        sharding: Any = base.sharding if quantized else jax.typeof(base).sharding
        place = jax.sharding.reshard
        is_placed = (
            AxisType.Explicit not in sharding.mesh.axis_types
        )  # the compiler places the rest
    else:
        sharding, place = base.sharding, jax.device_put
        named = isinstance(sharding, NamedSharding)
        is_placed = not base.committed or (not named and is_tracer(factor))
    if is_placed:
        return factor
    sharding = factor_sharding(sharding, out, labels)
    key = (id(factor), sharding)
    if key not in placed:  # The factor is stored as well: an `id` is unique only while it is alive.
        placed[key] = factor, place(factor, sharding)
    return placed[key][1]

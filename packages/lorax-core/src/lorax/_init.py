"""The first factors: `init_lora` and the initialisers it knows by name."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from ._axes import Axes
from ._boxes import box_factors
from ._compat import is_tracer
from ._contract import wide_dtype
from ._errors import SpecError
from ._pair import flatten_params, own
from ._sharding import factor_sharding
from ._spec import LORA_FREEZE, LORA_FULL, LoraSpec, check_leaf
from ._weight import LoraWeight

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real, imaginary = jax.random.split(key)
        part = jnp.finfo(dtype).dtype
        return jax.lax.complex(_uniform(real, shape, part), _uniform(imaginary, shape, part))
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / min(shape)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.nn.initializers.orthogonal()(key, shape, dtype)


INITIALIZERS: dict[str, Initializer] = {
    # What PEFT does by default: kaiming_uniform(a=√5) is uniform in ±1/√fan_in.
    "uniform": _uniform,
    # PEFT's "gaussian": a standard deviation of 1/rank.
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "zeros": jax.nn.initializers.zeros,
}


def init_lora(
    param_tree: Any,
    spec: Any,
    rng: jax.Array,
    *,
    a_init: str | Initializer = "uniform",
    b_init: str | Initializer = "zeros",
    dtype: Any = None,
) -> tuple[Any, Any]:
    """Splits parameters into a frozen tree and a tunable one with fresh factors.

    `a` is uniform in ±1/√fan_in and `b` is zero, so the adapted model is the base model at first.
    Each leaf has a key of its own, folded from its path: adding a layer changes no other.

    Args:
        param_tree: the parameters, any pytree; leaves that are not arrays are kept as they are.
        spec: a tree of the same structure; each leaf is `LORA_FREEZE`, `LORA_FULL`, a rank or a
            `LoraSpec`.
        rng: a PRNG key, new style or old.
        a_init: "uniform", "gaussian", "orthogonal", "zeros", or a function
            `(key, shape, dtype) -> array` as in `jax.nn.initializers`. It makes the matrix
            `[fan_in, rank]` of each entry of the shared axes.
        b_init: the same for `[rank, fan_out]`.
        dtype: of the factors; by default the base's, and float32 for narrower ones.

    Returns:
        `(frozen, tunable)`, both with the structure of `param_tree`. Frozen leaves are the same
        buffers, not copies; all of `tunable` is its own, so a training step may donate it. Factors
        are sharded as their base is, axis by axis, and uncommitted where it is. Where Flax has
        boxed a base with its partition (`nn.Partitioned`), the factors have boxes with theirs.

    Raises:
        SpecError: where the spec does not fit; the message names the path.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LORA_FREEZE, LORA_FULL, init_lora
        >>> params = {"w": jnp.ones((5, 3)), "scale": jnp.ones(3), "b": jnp.zeros(3)}
        >>> spec = {"w": 2, "scale": LORA_FREEZE, "b": LORA_FULL}
        >>> frozen, tunable = init_lora(params, spec, jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].b.shape, tunable["scale"], frozen["b"]
        ((5, 2), (2, 3), None, None)
    """
    initializers = _initializer("a_init", a_init), _initializer("b_init", b_init)
    leaves, structure = flatten_params(param_tree)
    specs = _flatten_spec(spec, structure)
    frozen: list[Any] = []
    tunable: list[Any] = []
    for (path, leaf), leaf_spec in zip(leaves, specs, strict=True):
        checked = check_leaf(path, leaf, leaf_spec)
        if checked == LORA_FREEZE:
            frozen.append(leaf)
            tunable.append(None)
        elif checked == LORA_FULL:
            frozen.append(None)
            tunable.append(own(leaf))
        else:
            assert isinstance(checked, tuple)
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            frozen.append(leaf)
            tunable.append(_init_weight(key, leaf, *checked, initializers, dtype))
    return jax.tree.unflatten(structure, frozen), box_factors(
        jax.tree.unflatten(structure, tunable)
    )


def _initializer(name: str, initializer: str | Initializer) -> Initializer:
    if not isinstance(initializer, str):
        return initializer
    if initializer not in INITIALIZERS:
        known = ", ".join(repr(known) for known in INITIALIZERS)
        raise SpecError(
            f"{name}={initializer!r} is not known; it is one of {known}, or a function."
        )
    return INITIALIZERS[initializer]


def _flatten_spec(spec: Any, structure: Any) -> list[Any]:
    is_leaf = lambda node: node is None or isinstance(node, LoraSpec)  # noqa: E731
    leaves, other = jax.tree.flatten(spec, is_leaf=is_leaf)
    if other != structure:
        raise SpecError(
            "The spec must have the structure of the parameters. Parameters: "
            f"{structure}; spec: {other}. `simple_spec`, `spec_from_rules` and `infer_spec` make "
            "one that fits."
        )
    return leaves


def _init_weight(
    key: jax.Array,
    base: Any,
    spec: LoraSpec,
    axes: Axes,
    initializers: tuple[Initializer, Initializer],
    dtype: Any,
) -> LoraWeight:
    dtype = wide_dtype(base.dtype) if dtype is None else jnp.dtype(dtype)
    rank, (fan_in, fan_out) = spec.rank, axes.sizes(base.shape)
    shared = tuple(base.shape[d] for d in axes.shared)
    count = math.prod(shared)

    def factor(key: jax.Array, init: Initializer, matrix: tuple[int, int]) -> jax.Array:
        if not shared:
            # An initializer may return an array that is kept elsewhere.
            return own(init(key, matrix, dtype))
        return jax.vmap(lambda key: init(key, matrix, dtype))(jax.random.split(key, count))

    a_key, b_key = jax.random.split(key)
    a = factor(a_key, initializers[0], (fan_in, rank))
    b = factor(b_key, initializers[1], (rank, fan_out))
    weight = LoraWeight(
        a.reshape(*shared, *(base.shape[d] for d in axes.inputs), rank),
        b.reshape(*shared, rank, *(base.shape[d] for d in axes.outputs)),
        rank=rank,
        alpha=spec.alpha,
        scaling=spec.scaling,
        in_axes=axes.inputs,
        out_axes=axes.outputs,
        shared_axes=axes.shared,
    )
    return _place_like(weight, base)


def _place_like(weight: LoraWeight, base: Any) -> LoraWeight:
    """Moves the factors to where their base lives, each axis sharded as the base's axis."""
    if not isinstance(base, jax.Array):
        return weight
    if is_tracer(base):
        sharding: Any = jax.typeof(base).sharding
        place = jax.sharding.reshard
        settled = AxisType.Explicit not in sharding.mesh.axis_types  # the compiler places the rest
    else:
        sharding, place = base.sharding, jax.device_put
        named = isinstance(sharding, NamedSharding)
        settled = not base.committed or (not named and is_tracer(weight.a))
    if settled:
        return weight
    term = weight.term(base.shape)
    a, b = (
        place(factor, factor_sharding(sharding, term.out, labels))
        for factor, labels in zip((weight.a, weight.b), term.labels, strict=True)
    )
    return dataclasses.replace(weight, a=a, b=b)

"""The oracle: checks that an adapted model computes what the merged model does, without merging.

    from lorax import testing
    testing.check(model, params, spec, x)

Every rule of Lorax is tested with it, and it checks adapters on your own model as well.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ._adapter import Adapter, Layout
from ._arrays import Encoded, checked_key
from ._built import Weights, built, excess
from ._compared import (
    arrays_of,
    checkpointed,
    compare,
    over_adapters,
    over_data,
    scanned_over,
    split_data,
    value_and_gradient,
)
from ._errors import ArgumentError, CheckError, MaterializeError
from ._frozen_weight import FrozenWeight
from ._init import init_lora
from ._keywords import refuses_ambiguous_keywords
from ._made import SHARED, Made
from ._merge import merge_params
from ._pair import (
    Leaf,
    combine,
    flatten_pair,
    flatten_params,
    flatten_tunable,
    pair_of_call,
)
from ._terms import Label, Labels
from ._transform import lora

__all__ = ["CheckError", "check", "random_factors", "weight_sized"]


@refuses_ambiguous_keywords
def check(
    fn: Callable[..., Any],
    params: Any,
    spec: Any,
    /,
    *args: Any,
    tolerance: float | None = None,
    transforms: bool = True,
    materializes: bool = False,
    seed: int = 0,
    through_custom_derivatives: bool = False,
    **kwargs: Any,
) -> None:
    """Checks `lora(fn)` against the merged model, on random non-zero factors.

    1. The value, and the gradient of every trained parameter, equal those of `fn` on merged
       parameters, within `tolerance` times the largest entry of each.
    2. The same holds under `jit`, `vmap` over data, `vmap` over adapters, `checkpoint` and `scan`.
    3. No equation creates an array that holds a whole adapted weight, unless `fn` does: see
       `weight_sized`.

    Args:
        fn: a function of the parameters first.
        params: the parameters.
        spec: as for `init_lora`.
        *args: what `fn` is called with.
        tolerance: the allowed error relative to the largest entry. By default, 100 rounding units
            of the lowest precision among the results; or 8 units if that is a 16-bit dtype, or if
            matrix units round float32 (TF32 on a GPU, bfloat16 on a TPU) because
            `jax.default_matmul_precision` does not ask for more.
        transforms: whether to check point 2.
        materializes: whether the weight is expected to be materialized: then, instead of point 3,
            `lora` must report it.
        seed: the seed of the random factors.
        through_custom_derivatives: as in `lora`; the merged model keeps the derivative rules, so
            that point 1 fails if one of them is not the derivative of its function.
        **kwargs: what `fn` is called with; a keyword with the name of an option must be bound with
            `functools.partial` before.

    Raises:
        CheckError: if a check fails; it says which one, with the numbers. It is an
            `AssertionError`.
        ArgumentError: if an argument is a shape instead of an array, or an option has the name
            of a keyword of `fn`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import testing
        >>> testing.check(lambda params, x: x @ params["w"], {"w": jnp.ones((7, 5))}, {"w": 2},
        ...               jnp.ones((3, 7)))
    """
    for leaf in jax.tree.leaves((params, args, kwargs)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ArgumentError(
                f"check runs the function, so it needs arrays, not {leaf}. To check symbolic "
                "sizes, call check at several concrete ones."
            )
    # Zeros are drawn fastest; random numbers replace them next.
    frozen, tunable = init_lora(params, spec, jax.random.key(seed), a_init="zeros")
    tunable = random_factors(tunable, jax.random.key(seed + 1))
    frozen = _random_frozen(frozen, tunable, jax.random.key(seed + 2))
    mode = "allow" if materializes else "error"
    through = through_custom_derivatives
    adapted = lora(fn, on_materialize=mode, through_custom_derivatives=through)

    def ours(tunable: Any, *args: Any) -> Any:
        return adapted((frozen, tunable), *args, **kwargs)

    def merged(tunable: Any, *args: Any) -> Any:
        return fn(merge_params(frozen, tunable), *args, **kwargs)

    if materializes:
        _expect_message(fn, frozen, tunable, args, kwargs)
    else:
        whole = weight_sized(
            fn, frozen, tunable, *args, through_custom_derivatives=through, **kwargs
        )
        if whole:
            raise CheckError(
                f"adapted weights are materialized, as arrays of these shapes: {whole}"
            )
    programs = {"value and gradient": value_and_gradient}
    if transforms:
        programs |= {
            "vmap over data": over_data,
            "vmap over adapters": over_adapters,
            "checkpoint": checkpointed,
            "scan": scanned_over,
        }

    # Data are operands: XLA would fold constants at compile time.
    data, fill = split_data(args)

    def results(function: Any) -> dict[str, Any]:
        def run(tunable: Any, data: list[Any]) -> dict[str, Any]:
            return {name: make(function, fill(data))(tunable) for name, make in programs.items()}

        return jax.jit(run)(tunable, data)

    got, expected = results(ours), results(merged)
    for name in programs:
        compare(name, got[name], expected[name], tolerance)


def random_factors(tunable: Any, key: jax.Array) -> Any:
    """Returns the tree with normally distributed factors, so that no delta is zero.

    Args:
        tunable: the tunable tree of a pair.
        key: a PRNG key.

    Returns:
        A tree of the same structure, shapes, dtypes and shardings.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora
        >>> from lorax.testing import random_factors
        >>> frozen, tunable = init_lora({"w": jnp.ones((3, 2))}, {"w": 1}, jax.random.key(0))
        >>> bool((tunable["w"].b == 0).all())
        True
        >>> bool((random_factors(tunable, jax.random.key(1))["w"].b == 0).any())
        False
    """
    words = jax.random.key_data(checked_key(key, "random_factors"))
    # NumPy draws without compiling; JAX would compile a program for each shape.
    generator = np.random.default_rng(np.asarray(words))

    def draw(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf  # such as a dropout key
        numbers = generator.standard_normal(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            numbers = numbers + 1j * generator.standard_normal(leaf.shape)
        # Halved, so that the delta is about as large as an ordinary base and rounding stays small.
        drawn = jnp.asarray((numbers / 2).astype(leaf.dtype))
        named = isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(drawn, leaf.sharding) if named else drawn

    return jax.tree.map(draw, tunable)


def _random_frozen(frozen: Any, tunable: Any, key: jax.Array) -> Any:
    """Returns the frozen tree with normally distributed frozen factors of each delta."""
    leaves, structure = flatten_params(frozen)
    adapters, _ = flatten_tunable(tunable, frozen, structure)

    def drawn(leaf: Any, adapter: Any) -> Any:
        if not isinstance(leaf, FrozenWeight):
            return leaf
        gains = adapter.layout(leaf.shape).gains
        # Gains such as ‖W‖² must keep their values: random ones would not be norms of the base.
        of_delta = {name: x for name, x in leaf.factors.items() if name not in gains}
        factors = leaf.factors | random_factors(of_delta, key)
        return dataclasses.replace(leaf, factors=factors)

    new_leaves = [drawn(leaf, new) for (_, leaf), new in zip(leaves, adapters, strict=True)]
    return jax.tree.unflatten(structure, new_leaves)


@refuses_ambiguous_keywords
def weight_sized(
    fn: Callable[..., Any],
    pair: Any,
    /,
    *args: Any,
    through_custom_derivatives: bool = False,
    **kwargs: Any,
) -> dict[tuple[int, ...], int]:
    """Returns shapes of arrays that hold a whole adapted weight in `lora(fn)` but not in `fn`.

    The axes of every adapted weight are followed through all equations, including nested ones. An
    array counts if both factors of a weight went into it and it still shows an input axis and an
    output axis: a merged weight, its delta or a piece of it, transposed, reshaped or scaled. A
    whole copy of its base counts as well. Results of products with data do not, so sizes may
    coincide. Not followed, but reported by `lora` itself: a base that OFT has turned, and rows that
    an adapter looks up (`TokensSpec`, a remainder of `MissSpec`).

    Args:
        fn: a function of the parameters first.
        pair: the pair `(frozen, tunable)`, or its two trees, one after the other.
        *args: what `fn` is called with.
        through_custom_derivatives: as in `lora`.
        **kwargs: what `fn` is called with.

    Returns:
        For each shape, how many more such arrays are created than by `fn` on plain parameters.
        Empty if no weight is materialized.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora
        >>> from lorax.testing import weight_sized
        >>> pair = init_lora({"w": jnp.ones((3, 2))}, {"w": 1}, jax.random.key(0))
        >>> x = jnp.ones((4, 3))
        >>> weight_sized(lambda params, x: x @ params["w"], pair, x)
        {}
        >>> sorted(weight_sized(lambda params, x: x @ jnp.tanh(params["w"]), pair, x))
        [(3, 2)]
    """
    (frozen, tunable), args = pair_of_call((pair, *args), "weight_sized")
    leaves, structure = flatten_pair(frozen, tunable, "weight_sized")
    adapters = [leaf.tunable for leaf in leaves if leaf.is_adapted]
    bases = [leaf.frozen for leaf in leaves if leaf.is_adapted]
    # In the order in which JAX flattens them.
    frozen_factors = [
        dict(sorted(leaf.frozen_factors.items())) for leaf in leaves if leaf.is_adapted
    ]
    adapted = lora(
        fn,
        on_materialize="allow",
        on_unused="allow",
        through_custom_derivatives=through_custom_derivatives,
    )
    data, fill = split_data(args)

    def ours(bases: Any, frozen_factors: Any, adapters: Any, data: list[Any]) -> list[jax.Array]:
        frozen, tunable = _with_adapters(leaves, structure, bases, frozen_factors, adapters)
        return arrays_of(adapted((frozen, tunable), *fill(data), **kwargs))

    def plain(bases: list[Any], data: list[Any]) -> list[jax.Array]:
        rest = iter(bases)
        params = combine(leaves, structure, lambda _: next(rest))
        if not is_encoded:
            return arrays_of(fn(params, *fill(data), **kwargs))
        nothing = jax.tree.unflatten(structure, [None] * len(leaves))
        return arrays_of(adapted((params, nothing), *fill(data), **kwargs))

    is_encoded = any(isinstance(leaf.frozen, Encoded) for leaf in leaves)
    # Codes are data: a decoded weight has its delta, which is found by its factors.
    of_bases = [
        None if isinstance(base, Encoded) else _of_base(k, weight)
        for k, (base, weight) in enumerate(zip(bases, adapters, strict=True))
        for _ in jax.tree.leaves(base)
    ]
    of_frozen: list[Made | None] = []
    of_adapters: list[Made | None] = []
    sizes: list[int] = []
    blocks: set[int] = set()
    for k, (base, adapter) in enumerate(zip(bases, adapters, strict=True)):
        layout = adapter.layout(base.shape)
        sides = {
            label: side
            for side, axes in _sides(adapter).items()
            for d in axes
            for label in layout.out[d]
        }
        shared = {label for d in adapter.axes.shared for label in layout.out[d]}
        of_frozen += _of_factors(k, layout, sides, shared, frozen_factors[k], layout.frozen)
        of_adapters += _of_adapter(k, layout, sides, shared, adapter)
        in_blocks = _spans(layout, sides)
        blocks |= {k} if in_blocks else set()
        sizes.append(math.prod(adapter.axes.sizes(base.shape) if in_blocks else base.shape))
    # Sides of size one, which no array needs to show.
    thin = frozenset(
        (k, side)
        for k, (base, weight) in enumerate(zip(bases, adapters, strict=True))
        for side, axes in _sides(weight).items()
        if all(base.shape[d] == 1 for d in axes)
    )
    weights = Weights(thin, sizes, frozenset(blocks))
    rest = [None] * len(data)
    got = jax.make_jaxpr(ours)(bases, frozen_factors, adapters, data)
    expected = jax.make_jaxpr(plain)(bases, data)
    return excess(
        built(got, of_bases + of_frozen + of_adapters + rest, weights),
        built(expected, of_bases + rest, weights),
    )


def _with_adapters(
    leaves: Sequence[Leaf], structure: Any, bases: Any, frozen_factors: Any, adapters: Any
) -> tuple[Any, Any]:
    """Returns the pair with other bases, frozen factors and adapters."""
    rest = iter(zip(bases, frozen_factors, adapters, strict=True))
    frozen: list[Any] = []
    tunable: list[Any] = []
    for leaf in leaves:
        base, factors, adapter = next(rest) if leaf.is_adapted else (leaf.frozen, {}, leaf.tunable)
        # Without settings: nothing is quantized here, so nothing is recomputed.
        frozen.append(FrozenWeight(base, factors) if factors else base)
        tunable.append(adapter)
    return jax.tree.unflatten(structure, frozen), jax.tree.unflatten(structure, tunable)


def _sides(weight: Adapter) -> dict[str, tuple[int, ...]]:
    return {"in": weight.axes.inputs, "out": weight.axes.outputs}


def _of_base(k: int, weight: Adapter) -> Made:
    """Returns base number k, which shows its inputs and its outputs."""
    shown = {d: frozenset({(k, side)}) for side, axes in _sides(weight).items() for d in axes}
    shared = frozenset({SHARED})
    axes = tuple(shown.get(d, shared) for d in range(sum(map(len, weight.axes))))
    return Made(axes, frozenset({(k, "in"), (k, "out")}), False)


def _of_factors(
    k: int,
    layout: Layout,
    sides: Mapping[Label, str],
    shared: Set[Label],
    factors: Iterable[str],
    labels: Mapping[str, Labels],
) -> list[Made | None]:
    """Makes factors: `a [*shared, *in, rank]` shows inputs, `b [*shared, rank, *out]` outputs.

    A gain shows no side: a base times a gain shows those of the base.
    """
    made: list[Made | None] = []
    for name in factors:
        if name in layout.gains:
            made.append(_number(len(labels[name])))
            continue
        both = frozenset((k, sides[x]) for x in labels[name] if x in sides)
        axes = tuple(
            frozenset({(k, sides[x])} if x in sides else {SHARED} if x in shared else ())
            for x in labels[name]
        )
        made.append(Made(axes, both, not _spans(layout, sides)))
    return made


def _number(ndim: int) -> Made:
    """Makes an array that shows no side."""
    return Made((frozenset(),) * ndim, frozenset(), False)


def _of_adapter(
    k: int, layout: Layout, sides: Mapping[Label, str], shared: Set[Label], adapter: Adapter
) -> list[Made | None]:
    """Makes the arrays of an adapter, in the order in which JAX flattens it.

    Numbers besides the factors, such as the weights of a mixture, show no side. Other arrays, such
    as a dropout key, are data.
    """
    names = list(adapter.factors())
    factors = dict(
        zip(names, _of_factors(k, layout, sides, shared, names, layout.factors), strict=True)
    )
    numbers = [
        _number(jnp.ndim(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None
        for leaf in jax.tree.leaves(adapter)
    ]
    # The names, in place of the factors, say which leaves are factors.
    marked = jax.tree.leaves(adapter.with_factors({name: name for name in names}))
    return [
        factors[leaf] if isinstance(leaf, str) else number
        for leaf, number in zip(marked, numbers, strict=True)
    ]


def _spans(layout: Layout, sides: Mapping[Label, str]) -> bool:
    """Whether a single factor has axes of both sides, as in a Kronecker product."""
    several = (*layout.factors.values(), *layout.frozen.values())
    return any({sides.get(x) for x in labels} >= {"in", "out"} for labels in several)


def _expect_message(fn: Any, frozen: Any, tunable: Any, args: Any, kwargs: Any) -> None:
    try:
        lora(fn, on_materialize="error")((frozen, tunable), *args, **kwargs)
    except MaterializeError:
        return
    raise CheckError(
        "`materializes=True`, but no weight is materialized, or one is without a MaterializeWarning"
    )

"""The shapes of factors, given a base, and the shape of a base, given the factors.

A frozen factor is stored with the base in the frozen tree, not in the tunable one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import Adapter, SpecError
from lorax.kinds import factors_from_base

from ._disk.arrays import sharding_like_base
from ._errors import AdapterMismatchError
from ._tree import absent, is_array

# What `Adapter.layout` may raise if the settings come from an untrusted file.
_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError)


class Shapes(NamedTuple):
    """The shapes of an adapter's factors on one base, all by the factor's name."""

    factors: dict[str, tuple[int, ...]]
    frozen: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[int | None, ...]]  # the base's axis of each axis; None for inner ones


def factor_shapes(path: str, weight: Adapter, base: Any) -> Shapes:
    """The shapes of an adapter's factors on a base.

    Raises:
        AdapterMismatchError: if the base has other axes, or cannot have such an adapter.
    """
    shape = tuple(base.shape)
    if not jnp.issubdtype(base.dtype, jnp.inexact):
        raise AdapterMismatchError(f"adapts `{path}`, which holds {base.dtype}.")
    try:
        weight.axes.check(path, len(shape))
    except SpecError as error:
        raise AdapterMismatchError(str(error)) from error
    try:
        layout = weight.layout(shape)
    except _ERRORS as error:
        raise AdapterMismatchError(
            f"its {weight.kind} adapter does not fit `{path}` of shape {shape}: {error}"
        ) from error
    labels = {**layout.factors, **layout.frozen}
    shapes = {name: tuple(label.size for label in labels[name]) for name in labels}
    return Shapes(
        {name: shapes[name] for name in layout.factors},
        {name: shapes[name] for name in layout.frozen},
        {name: tuple(map(layout.axis_of, labels[name])) for name in labels},
    )


def blank_rows(
    leaves: Mapping[str, Any], weights: Mapping[str, Adapter]
) -> tuple[dict[str, Adapter], dict[str, dict[str, jax.ShapeDtypeStruct]]]:
    """The shapes of the tunable and of the frozen factors, as `init_lora` would create them.

    Each axis of a factor is sharded like the axis of the base that it comes from.
    """
    rows: dict[str, Adapter] = {}
    frozen: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, weight in weights.items():
        base = leaves.get(path)
        if not is_array(base):
            raise AdapterMismatchError(f"adapts `{path}`, {absent(path, leaves)}")
        shapes = factor_shapes(path, weight, base)
        factors = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=sharding_like_base(base, shapes.axes[name])
            )
            for name, shape in {**shapes.factors, **shapes.frozen}.items()
        }
        rows[path] = weight.with_factors(factors)
        frozen[path] = {name: factors[name] for name in shapes.frozen}
    return rows, frozen


def base_sizes(weight: Adapter) -> Sequence[int | None]:
    """The size of each of the base's axes, inferred from the factors; None if it is not known.

    Raises:
        AdapterMismatchError: if the factors fit no base.
    """
    ndim = sum(map(len, weight.axes))
    try:
        weight.axes.check(weight.kind, ndim)
        layout = weight.layout((1,) * ndim)
    except SpecError as error:
        raise AdapterMismatchError(str(error)) from error
    except _ERRORS:
        return [None] * ndim  # a kind that splits the axes into blocks
    sizes: dict[Any, int] = {}
    for name, factor in weight.factors().items():
        labels = layout.factors[name]
        if len(labels) != len(factor.shape):
            raise AdapterMismatchError(
                f"the factor {name} has {len(factor.shape)} axes, not {len(labels)}"
            )
        for label, size in zip(labels, factor.shape, strict=True):
            if sizes.setdefault(label.id, size) != size:
                raise AdapterMismatchError(
                    f"the factor {name} has the shape {tuple(factor.shape)}, which does not fit "
                    "the other factors"
                )
    return [
        math.prod(sizes[label.id] for label in labels)
        if all(label.id in sizes for label in labels)
        else None
        for labels in layout.out
    ]


def base_shape(weight: Adapter) -> tuple[int, ...] | None:
    """The shape of the base, inferred from the adapter's factors; None if they leave it open."""
    sizes = base_sizes(weight)
    if None in sizes:
        return None
    shape = tuple(size for size in sizes if size is not None)
    shapes = {name: tuple(factor.shape) for name, factor in weight.factors().items()}
    if weight.layout(shape).shapes() != shapes:
        raise AdapterMismatchError(f"the factors have the shapes {shapes}, which fit no weight")
    return shape


def padded_shape(weight: Adapter) -> tuple[int, ...]:
    """The shape of the smallest base that the adapter's factors fit: unknown sizes are 1."""
    return tuple(1 if size is None else size for size in base_sizes(weight))


def check_frozen(path: str, weight: Adapter, frozen: Mapping[str, Any]) -> None:
    """Rejects an adapter without the frozen factors that cannot be computed from its base.

    Raises:
        AdapterError: if one is missing.
    """
    ones = (1,) * sum(map(len, weight.axes))
    try:
        needed = weight.layout(ones).frozen.keys() - frozen.keys()
    except _ERRORS:
        needed = weight.layout(base_shape(weight) or ones).frozen.keys() - frozen.keys()
    if needed:
        _check_lacking(path, weight, needed, jax.ShapeDtypeStruct(ones, jnp.float32))


def _check_lacking(
    path: str, weight: Adapter, lacking: Iterable[str], base: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the factors computed from a base; raises if others are lacking."""
    shape = jax.ShapeDtypeStruct(base.shape, base.dtype)
    derived = jax.eval_shape(weight.derived, shape)
    if missing := sorted(set(lacking) - derived.keys()):
        raise AdapterMismatchError(
            f"lacks `{path}/{missing[0]}`, which a {weight.kind} adapter keeps with its base. "
            "Save the whole pair: `save_adapter(file, lorax.Pair(frozen, tunable))`.",
        )
    return derived


def complete(path: str, weight: Adapter, base: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """All frozen factors of an adapter on a base: computed from the base if possible, else given.

    Computed factors take precedence: those in a file may come from another base, such as the
    floats that this one was quantized from.

    Raises:
        AdapterMismatchError: if one is neither computed nor given.
    """
    shapes = factor_shapes(path, weight, base)
    lacking = shapes.frozen.keys() - frozen.keys()
    derived: Mapping[str, Any] = _check_lacking(path, weight, lacking, base) if lacking else {}
    if shapes.frozen and not isinstance(base, jax.ShapeDtypeStruct):
        where = {name: sharding_like_base(base, axes) for name, axes in shapes.axes.items()}
        derived = factors_from_base(weight, base, where)
    return {name: derived[name] if name in derived else frozen[name] for name in shapes.frozen}

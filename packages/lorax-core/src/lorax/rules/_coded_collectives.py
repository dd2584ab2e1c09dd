"""Collectives on a base that is stored as codes.

A collective that only moves entries between devices moves codes and scales, each separately. One
that adds entries of several devices needs floats, so the base is decoded first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _compat
from .._coded import CodedArray, is_coded
from .._factored import FactoredArray
from .._terms import Inexpressible, Label, Term

# Deferred equations f with f(0) = 0: they may be applied after a move that leaves zeros somewhere.
_OF_ZERO_ZERO = frozenset(
    ["convert_element_type", "copy", "name", "neg", "reduce_precision", "stop_gradient"]
)


def moved_base(
    eqn: Any,
    weight: FactoredArray,
    names: Any,
    change: Callable[[Term], Term],
    makes_zeros: bool = False,
) -> Any:
    """Returns the base after a move of entries between the devices along `names`.

    Args:
        eqn: the collective.
        weight: the weight whose base is moved.
        names: the mesh axes of the collective.
        change: moves the codes and scales, given as a term.
        makes_zeros: whether some devices receive zeros.

    If the codes cannot be moved, the base is decoded, and that is recorded.
    """
    base = weight.base
    if not is_coded(base):
        return eqn(base)
    try:
        _check_alike(base, names)
        # `changed` applies the deferred equations after the move: wrong for f(0) ≠ 0 where a device
        # receives zeros.
        deferred = {move.primitive.name for move in base.moves if move.commutes}
        if makes_zeros and not deferred <= _OF_ZERO_ZERO:
            raise Inexpressible("leaves zeros on some devices, which a deferred operation changes")
        return base.changed(change)
    except Inexpressible as reason:
        eqn.use(
            weight,
            "materialized",
            str(reason) or "moves parts into which the codes cannot be split",
        )
        return eqn(base)


def summed_base(eqn: Any, weight: Any) -> Any:
    """Returns the base of a weight for a sum over devices; codes are decoded, which is recorded."""
    if not isinstance(weight, FactoredArray):
        return weight
    if is_coded(weight.base):
        eqn.use(weight, "materialized", "sums the weight over several devices")
    return weight.base


def _check_alike(base: CodedArray, names: Any) -> None:
    """Raises if a number that is still to be applied to the entries may differ between devices."""
    # Under `check_vma=False`, types do not show what varies, and everything may.
    is_known = _compat.varying_axes(base.first).issuperset(names)
    for move, others in zip(base.moves, base.others, strict=True):
        # Only these stay deferred until after the move. They would use the number of the receiving
        # device instead of that of the sending one.
        for other in others if move.commutes else ():
            differs = not is_known or not _compat.varying_axes(other).isdisjoint(names)
            if _compat.is_tracer(other) and differs:
                raise Inexpressible(
                    "moves entries that each device may have scaled by a different number"
                )


def exchanged(term: Term, axis: int, size: int, name: Any, groups: Any) -> tuple[Term, Label]:
    """Splits an axis over devices and receives this device's part from all of them.

    Returns:
        The term, in which `axis` has this device's part and every array a leading label for the
        device that it came from, and that label. Arrays that do not run along the axis are
        gathered.
    """
    label = term.out[axis][0] if term.out[axis] else Label(-1, 1)
    if label.size % size:
        raise Inexpressible(f"splits {label.size} blocks of codes over {size} devices")
    part = term.fresh(label.size // size)
    device = term.fresh(size, skip=1)

    def exchange(array: jax.Array, labels: Sequence[Label]) -> jax.Array:
        if label not in labels:
            return jax.lax.all_gather(array, name, axis_index_groups=groups)
        # [1, *labels] -> [devices, *labels], where `label` is divided by the number of devices
        split = 1 + labels.index(label)
        options: dict[str, Any] = {"axis_index_groups": groups, "tiled": True}
        return jax.lax.all_to_all(array[None], name, split, 0, **options)

    arrays = tuple(map(exchange, term.factors, term.labels))
    moved = dataclasses.replace(term.rename({label: (part,)}), factors=arrays)
    return dataclasses.replace(moved, labels=tuple((device, *x) for x in moved.labels)), device


def sent(term: Term, name: Any, perm: Sequence[tuple[int, int]], size: int) -> Term:
    """Sends arrays from device to device, as `ppermute` does.

    A device that receives nothing keeps its own arrays, times a gain of zero: codes of zero need
    not decode to zero.
    """
    arrays = tuple(jax.lax.ppermute(array, name, perm) for array in term.factors)
    if len(perm) == size:
        return dataclasses.replace(term, factors=arrays)
    is_target = np.isin(np.arange(size), [target for _, target in perm])
    has_got = jnp.asarray(is_target)[jax.lax.axis_index(name)]
    kept = tuple(jnp.where(has_got, *both) for both in zip(arrays, term.factors, strict=True))
    # `decode` multiplies by arrays beyond the named ones: 1 where something was received, else 0.
    return dataclasses.replace(term, factors=kept).times(has_got.astype(jnp.float32), ())

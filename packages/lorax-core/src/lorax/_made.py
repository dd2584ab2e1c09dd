"""How one equation propagates which axes of its results come from weights.

Each array that is made from weights shows, per axis, the sides of weights that run along it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

# One side of one weight: its number, and "in" or "out".
Side = tuple[int, str]


# The sides that one axis shows, such as {(0, "in")}.
Sides = frozenset[Side]


# JOINED marks an axis that a reshape made of several. MIXED marks an axis along which data with
# axes of its own has scaled a weight: a sum over it is a product with data.
JOINED: Side = (-1, "joined")


MIXED: Side = (-1, "mixed")


# An axis of the weight that is neither input nor output: it counts layers or experts.
SHARED: Side = (-1, "shared")


class Made(NamedTuple):
    """The weights and factors that an array is made of. Data is represented by None instead.

    Data are arguments, constants, parameters without an adapter, and activations. An array without
    sides is made of an adapter's other numbers, such as its gains.

    Attributes:
        axes: the sides that each axis shows.
        sides: the sides of all values that went into the array.
        factors: whether a factor of an adapter went into it.
        picked: the sides of axes of which one entry was picked; stacking such entries shows them
            again.
    """

    axes: tuple[Sides, ...]
    sides: Sides
    factors: bool
    picked: Sides = frozenset()

    @property
    def weights(self) -> set[int]:
        """The numbers of the weights."""
        return {k for k, _ in self.sides}


def ndims_of(atoms: Sequence[Any]) -> list[int]:
    return [len(getattr(atom.aval, "shape", ())) for atom in atoms]


# With an operand that is data, the result of these is data.
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


_SUMS = ("add", "sub", "add_any")


# Result k of these is operand k, unchanged.
_EACH_BY_ITSELF = ("optimization_barrier", "pvary", "pcast", "device_put", "copy")


# Their bodies cannot be followed: with data among the operands, the result is data.
_OPAQUE = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call")


def results_of(eqn: Any, operands: list[Made | None]) -> list[Made | None]:
    name, params = eqn.primitive.name, eqn.params
    ndims = ndims_of(eqn.invars)
    first = operands[0]
    data = [
        atom
        for atom, made in zip(eqn.invars, operands, strict=True)
        if made is None and not isinstance(atom, jex.Literal)
    ]
    if name in _EACH_BY_ITSELF:
        return operands
    # Numbers of an adapter that show no side, such as gains, are data once they meet data.
    if data and not any(made.sides for made in operands if made is not None):
        return [None] * len(eqn.outvars)
    if name == "dot_general":
        return [_dot(params["dimension_numbers"], operands, ndims)]
    if data and name in (*_PRODUCTS, *_OPAQUE):
        return [None] * len(eqn.outvars)
    # Weight + data is data, such as positions; adding a scalar leaves a weight.
    if name in _SUMS and any(math.prod(atom.aval.shape) != 1 for atom in data):
        return [None]
    # Norms of a weight times data: one side has been summed over, so it is not the weight.
    if name in ("mul", "div") and data and all(map(_is_summed, filter(None, operands))):
        return [None]
    if first is not None:
        if name == "gather":
            return [_gather(params["dimension_numbers"], first, eqn.invars[1].aval.ndim)]
        if name == "transpose":
            return [first._replace(axes=tuple(first.axes[d] for d in params["permutation"]))]
        if name == "broadcast_in_dim":
            axes = [first.picked if size == 1 else frozenset() for size in params["shape"]]
            # New axes show nothing; of size one, they show what was picked, like a stack of one
            # entry.
            for sides, d in zip(first.axes, params["broadcast_dimensions"], strict=True):
                axes[d] = sides
            return [first._replace(axes=tuple(axes))]
        if name == "reshape":
            old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            # With `dimensions`, the operand is transposed first.
            order = params["dimensions"] or range(ndims[0])
            axes = _regrouped([first.axes[d] for d in order], [old[d] for d in order], new)
            return [first._replace(axes=axes)]
        if name == "squeeze":
            return [pick(first, *params["dimensions"])]
        if name == "unstack":
            return [pick(first, params["axis"])] * len(eqn.outvars)
        # Reduced axes disappear; the others show what they did.
        if name.startswith(("reduce_", "arg")):
            return [first._replace(axes=_others(first.axes, params.get("axes", ())))]
    if name == "stack":
        return [stacked(union(operands), params["axis"])]
    # Entrywise primitives, gains among them: axis d shows the sides of every operand's axis d.
    return [_by_position(operands, v.aval.ndim) for v in eqn.outvars]


def _is_summed(made: Made) -> bool:
    """Whether both sides of each weight went in, but one of them is no longer shown."""
    shown = frozenset[Side]().union(*made.axes, made.picked)
    return all(
        len({(k, "in"), (k, "out")} & made.sides) == 2 > len({(k, "in"), (k, "out")} & shown)
        for k in made.weights
    )


def _dot(dimension_numbers: Any, operands: Sequence[Made | None], ndims: list[int]) -> Made | None:
    (l_sum, r_sum), (l_batch, r_batch) = dimension_numbers
    nothing = [Made((frozenset(),) * ndim, frozenset(), False) for ndim in ndims]
    left, right = (made or empty for made, empty in zip(operands, nothing, strict=True))
    # The result of `dot_general` is [*batch, *left's own, *right's own].
    batch = [left.axes[i] | right.axes[j] for i, j in zip(l_batch, r_batch, strict=True)]
    if None in operands:
        # Axes of the data besides the batched ones.
        own = ndims[operands.index(None)] - len(batch)
        # A contraction with data, or an outer product with it, is data.
        if l_sum or (own and not batch):
            return None
        if own:
            batch = [sides | {MIXED} for sides in batch]
    is_mixed = any(MIXED in sides for sides in (*left.axes, *right.axes))
    for i, j in zip(l_sum, r_sum, strict=True):
        sides = left.axes[i], right.axes[j]
        shown = [any(k >= 0 for k, _ in each) for each in sides]
        if MIXED in sides[0] | sides[1]:
            return None
        # An axis that is the weight's on one side only: data came along on the other, unless this
        # is the rank axis of a factor that was reshaped together with an axis of the weight.
        own = {k for k, _ in sides[0] | sides[1]}
        if shown[0] != shown[1] and (is_mixed or not own <= left.weights & right.weights):
            return None
        left, right = _led_on(left, i, right.axes[j]), _led_on(right, j, left.axes[i])
    kept = [sides for d, sides in enumerate(left.axes) if d not in (*l_sum, *l_batch)]
    kept += [sides for d, sides in enumerate(right.axes) if d not in (*r_sum, *r_batch)]
    return Made(
        (*batch, *kept),
        left.sides | right.sides,
        left.factors or right.factors,
        left.picked | right.picked,
    )


def _led_on(made: Made, summed: int, met: Sides) -> Made:
    """Returns weight w after it met another weight along the axis `summed`, as in `w @ v`.

    To `w`, `v` is data. What is left of `w` takes the sides of the axis of `v` that it met, because
    the product may later be multiplied by the rest of `v`.
    """
    # Weights that this axis shows and the met axis does not: two different weights meet.
    gone = {k for k, _ in made.axes[summed] if k >= 0} - {k for k, _ in met}
    if not gone or not met:
        return made
    led_on = tuple(
        frozenset(side for side in sides if side[0] not in gone)
        | (met if any(k in gone for k, _ in sides) else frozenset())
        for sides in made.axes
    )
    return made._replace(axes=led_on)


def _gather(numbers: Any, made: Made, indices_ndim: int) -> Made | None:
    """A single index picks a layer or an expert; an index array looks up entries, which is data."""
    if indices_ndim > 1 and any(made.axes[d] - {SHARED} for d in numbers.start_index_map):
        return None
    paired = numbers.operand_batching_dims
    windows = iter(
        made.axes[d]
        for d in range(len(made.axes))
        if d not in (*numbers.collapsed_slice_dims, *paired)
    )
    # Looked-up entries of a shared axis, such as experts, still run along that axis.
    drawn = frozenset[Side]().union(*(made.axes[d] for d in numbers.start_index_map))
    batch = [drawn] * (indices_ndim - 1)
    for d, position in zip(paired, numbers.start_indices_batching_dims, strict=True):
        batch[position] = made.axes[d]
    rest = iter(batch)
    ndim = len(numbers.offset_dims) + len(batch)
    axes = tuple(next(windows if d in numbers.offset_dims else rest) for d in range(ndim))
    picked = made.picked.union(*(made.axes[d] for d in numbers.collapsed_slice_dims))
    return made._replace(axes=axes, picked=picked)


def _regrouped(axes: Sequence[Sides], old: Sequence[int], new: Sequence[int]) -> tuple[Sides, ...]:
    """Returns the axes of a reshaped array: each shows the sides of the old axes it is made of."""
    if 0 in new:  # Sizes of zero do not tell which axes became which.
        return (frozenset[Side]().union(*axes),) * len(new)
    out: list[Sides] = []
    rest = list(zip(axes, old, strict=True))
    shown: Sides = frozenset()
    # Products of the old and of the new sizes that have been consumed; where they agree, a group
    # of old axes is exactly a group of new ones.
    taken = given = 1
    waiting = joined = 0
    for size in new:
        given, waiting = given * size, waiting + 1
        while taken < given:
            sides, length = rest.pop(0)
            shown, taken = shown | sides, taken * length
            # Axes of size one and axes that show nothing cannot mix sides.
            joined += 1 if length != 1 and sides else 0
        if taken == given:
            # Several old axes with sides were merged: one axis may show both sides of a weight.
            if joined > 1:
                shown |= {JOINED}
            out += [shown] * waiting
            shown, waiting, joined = frozenset(), 0, 0
    return (*out, *[shown] * waiting)


def _by_position(operands: Iterable[Made | None], ndim: int) -> Made:
    """Returns the result of a primitive that keeps axes in place.

    An operand with another number of axes shows all of its sides on every axis.
    """
    axes = (frozenset[Side](),) * ndim
    sides = picked = frozenset[Side]()
    factors = False
    for made in operands:
        if made is None:
            continue
        shown = made.axes
        if len(shown) != ndim:
            # Unknown correspondence of axes: assume the most.
            shown = (frozenset[Side]().union(*shown, made.picked),) * ndim
        axes = tuple(one | other for one, other in zip(axes, shown, strict=True))
        sides, picked = sides | made.sides, picked | made.picked
        factors = factors or made.factors
    return Made(axes, sides, factors, picked)


def union(several: Iterable[Made | None]) -> Made | None:
    known = [made for made in several if made is not None]
    return _by_position(known, len(known[0].axes)) if known else None


def _others(axes: tuple[Sides, ...], dropped: Iterable[int]) -> tuple[Sides, ...]:
    return tuple(sides for d, sides in enumerate(axes) if d not in {*dropped})


def pick(made: Made | None, *dropped: int) -> Made | None:
    """Returns the array that one entry along each of the dropped axes makes."""
    if made is None:
        return None
    picked = made.picked.union(*(made.axes[d] for d in dropped))
    return made._replace(axes=_others(made.axes, dropped), picked=picked)


def stacked(made: Made | None, axis: int) -> Made | None:
    """Returns the array of several such arrays stacked along a new axis."""
    if made is None:
        return None
    return made._replace(axes=(*made.axes[:axis], made.picked, *made.axes[axis:]))

"""Which weights a value shows along each axis. This module contains no code for primitives."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """A section of a value's axis, and the axes of a weight that run along it."""

    size: Any
    axes: frozenset[int]


Axis = tuple[Span, ...]  # most significant first; the sizes multiply to the axis's size


class Link(NamedTuple):
    """A product of two weights that summed `axes` of one with `other_axes` of `other`."""

    axes: frozenset[int]
    other: Any
    other_axes: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Part:
    """How a value shows one weight: the spans of each of the value's axes.

    Attributes:
        axes: the spans of each axis.
        links: the products with other weights that the value is a result of.
        joined: whether data with the same axes was added to it or multiplied with it.
        transformed: the weight's axes that a Fourier transform has run over.
        beside: the `id`s of equations that have joined the weight with data.
    """

    axes: tuple[Axis, ...]
    links: frozenset[Link] = frozenset()
    joined: bool = False
    transformed: frozenset[int] = frozenset()
    beside: frozenset[int] = frozenset()

    def along(self, axes: Iterable[int]) -> frozenset[int]:
        """Returns the weight's axes that run along `axes` of the value."""
        return frozenset().union(*(span.axes for d in axes for span in self.axes[d]))

    @property
    def shown(self) -> frozenset[int]:
        """The axes of the value, other than those of size one, along which the weight runs."""
        return frozenset(
            d
            for d, axis in enumerate(self.axes)
            if any(span.axes and span.size != 1 for span in axis)
        )

    def move(self, move: Callable[[tuple[Axis, ...]], Iterable[Axis]]) -> "Part":
        """Returns the same part of a value whose axes are `move(axes)`."""
        return dataclasses.replace(self, axes=tuple(move(self.axes)))


# The key of data in `Value.parts`; the keys of weights are their names.
DATA = object()


@dataclasses.dataclass(frozen=True)
class Value:
    """The weights and the data that a value shows.

    Attributes:
        parts: how it shows each weight, and data.
        uses: the uses that it was computed from, as a bit mask.
    """

    parts: Mapping[Any, Part] = dataclasses.field(default_factory=dict[Any, Part])
    uses: int = 0

    @property
    def weights(self) -> dict[str, Part]:
        """The parts that are weights."""
        return {key: part for key, part in self.parts.items() if key is not DATA}

    @property
    def data(self) -> Part | None:
        """The part that is data."""
        return self.parts.get(DATA)

    def move(self, move: Callable[[tuple[Axis, ...]], Iterable[Axis]]) -> "Value":
        """Returns the value with every part moved."""
        return Value({key: part.move(move) for key, part in self.parts.items()}, self.uses)


CONSTANT = Value()


def whole(key: Any, shape: Sequence[Any]) -> Value:
    """Returns a weight, or data, as it enters the function."""
    # [in, out] is ((in: {0}),), ((out: {1}),): axis d of the value shows axis d of the weight.
    axes = tuple((Span(size, frozenset((d,))),) for d, size in enumerate(shape))
    return Value({key: Part(axes)})


def blank(size: Any) -> Axis:
    """Returns an axis along which nothing varies."""
    return (Span(size, frozenset()),)


def merge(values: Iterable[Value]) -> Value:
    """Returns a value that shows everything that any of `values` shows.

    If two show the same weight, an axis is that of the first one that shows something along it.
    """
    parts: dict[Any, Part] = {}
    uses = 0
    for value in values:
        uses |= value.uses
        for key, part in value.parts.items():
            parts[key] = _merge_parts(parts[key], part) if key in parts else part
    return Value(parts, uses)


def in_all_steps(before: Value, after: Value) -> Value:
    """Returns a carried value as it is both before and after a step; data, if either is.

    A carried weight that a step replaces, such as a learned initial state, is not followed.
    """
    merged = merge([before, after])
    # Weights that are shown on one side of the step only.
    lost = (before.parts.keys() ^ after.parts.keys()) - {DATA}
    return Value({k: part for k, part in merged.parts.items() if k not in lost}, merged.uses)


def _merge_parts(one: Part, two: Part) -> Part:
    if one is two:
        return one
    axes = tuple(
        x if any(span.axes for span in x) else y for x, y in zip(one.axes, two.axes, strict=True)
    )
    joined, transformed = one.joined or two.joined, one.transformed | two.transformed
    return Part(axes, one.links | two.links, joined, transformed, one.beside | two.beside)


def broadcasts(sizes: Sequence[Any], shape: Sequence[Any]) -> bool:
    """Whether axes of `sizes` are those of `shape`, or of size one."""
    return all(same(size, 1) or same(size, out) for size, out in zip(sizes, shape, strict=True))


def same(one: Any, two: Any) -> bool:
    """Whether two sizes, which may be symbols, are known to be equal."""
    try:
        return bool(one == two)
    except Exception as error:
        if type(error).__name__ != "InconclusiveDimensionOperation":
            raise
        return False


def divides(one: Any, two: Any) -> bool:
    """Whether one size is known to divide another."""
    return same(two % one, 0)


def resized(value: Value, shape: Sequence[Any]) -> Value:
    """Returns the value with axes of other sizes, as after a slice, shard or broadcast."""
    return value.move(lambda axes: fitted(axes, shape)) if value.parts else value


def fitted(axes: Sequence[Axis], shape: Sequence[Any]) -> tuple[Axis, ...]:
    """Returns the same axes with other sizes."""
    return tuple(_fit(axis, size) for axis, size in zip(axes, shape, strict=True))


def _fit(axis: Axis, size: Any) -> Axis:
    if same(math.prod(span.size for span in axis), size):
        return axis
    # A single entry that is repeated: nothing varies along the new axis.
    if len(axis) == 1 and same(axis[0].size, 1):
        return blank(size)
    # Cut or padded: everything that ran along the axis still does.
    return (Span(size, frozenset[int]().union(*(span.axes for span in axis))),)


def regroup(axes: Sequence[Axis], shape: Sequence[Any]) -> list[Axis]:
    """Returns the axes of a reshaped value: spans are cut or joined, but not moved."""
    # An empty array has no entries to follow.
    if any(same(size, 0) for size in shape):
        return list(map(blank, shape))
    spans = [span for axis in axes for span in axis]
    # Spans of size one fit any axis of size one, and are kept in order.
    ones = [span for span in spans if same(span.size, 1)]
    rest = [span for span in spans if not same(span.size, 1)]
    regrouped: list[Axis] = []
    for size in shape:
        axis = [ones.pop(0)] if same(size, 1) and ones else []
        left = size
        while not same(left, 1) and rest:
            span = rest.pop(0)
            # The span fits: [4, 6] -> [24] takes both.
            if same(left, span.size) or divides(span.size, left):
                axis.append(span)
                left = 1 if same(left, span.size) else left // span.size
            # The span is longer: [24] -> [4, 6] leaves the low part to the next axis.
            elif divides(left, span.size):
                axis.append(span._replace(size=left))
                rest.insert(0, span._replace(size=span.size // left))
                left = 1
            # Neither divides the other, so the span is merged with the next one.
            elif rest:
                rest[0] = Span(span.size * rest[0].size, span.axes | rest[0].axes)
            else:
                axis.append(span)
        regrouped.append(tuple(axis) or blank(size))
    return regrouped


def without(axes: Sequence[Axis], dropped: Iterable[int]) -> list[Axis]:
    """Returns the axes that are not dropped."""
    gone = set(dropped)
    return [axis for d, axis in enumerate(axes) if d not in gone]

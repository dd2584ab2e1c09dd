"""Builds the arrays of a quantized weight from tensors with another library's axes and blocks.

One axis of a tensor may combine several axes of the parameter, such as heads and their features. A
block of the file may then be longer than the last of these axes, or cross its end. Blocks in memory
are the longest runs of entries, along one axis of the parameter, that share a scale in the file;
if they are shorter than the file's, scales are repeated.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from lorax import QuantizedWeight
from lorax.bases import Blocks, Format

from .._disk.packed import DTYPES, Packed
from .._errors import UnsupportedAdapterError
from .._places import Array, Place
from .codings.coding import Coded, Part

Labels = Any  # axis labels of `lorax.bases`, each with a `size`

_FEWEST, _MOST = 2**12, 2**22  # bounds on the number of entries unpacked at a time


class Runs(NamedTuple):
    """Which entries of a parameter share a scale.

    Attributes:
        blocks: by axis, `(entries per block,)`, or `(blocks per group, entries per block)` if the
            format has groups.
        along: the axes whose entries share scales.
        is_shorter: whether blocks are shorter than those of the file.
    """

    blocks: dict[int, tuple[int, ...]]
    along: tuple[int, ...]
    is_shorter: bool

    @classmethod
    def of(cls, place: Place, coded: Coded) -> Self:
        """The runs of a parameter."""
        scales = coded.parts["scales"].grains
        grouped = getattr(coded.format, "group", None) is not None
        outer = coded.parts["outer"].grains if grouped else scales
        blocks: dict[int, tuple[int, ...]] = {}
        along: list[int] = []
        is_shorter = False
        for t, group in enumerate(place.whole):
            sizes = [place.shape[d] for d in group]
            if scales[t] == 1 or not group:
                continue
            if scales[t] >= math.prod(sizes) and not grouped:
                along += group
                continue
            last = group[-1]
            run, wide = math.gcd(scales[t], sizes[-1]), math.gcd(outer[t], sizes[-1])
            is_shorter |= run < scales[t] or wide < outer[t]
            along.append(last)
            if grouped:
                blocks[last] = (wide // run, run)
            elif run < sizes[-1]:
                blocks[last] = (run,)
        return cls(blocks, tuple(sorted(along)), is_shorter)


class Target(NamedTuple):
    """One array to build: its labels, the labels of the parameter's axes, and its dtype."""

    labels: Labels
    out: Labels
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(label.size for label in self.labels)


def blank(path: str, place: Place, coded: Coded, runs: Runs, dtype: Any) -> QuantizedWeight:
    """The quantized weight with `jax.ShapeDtypeStruct` in place of arrays."""
    labels = coded.format.labels(Blocks.of(place.shape, runs.blocks, runs.along))
    arrays = {
        name: jax.ShapeDtypeStruct([label.size for label in labels[name]], part.dtype)
        for name, part in coded.parts.items()
    }
    ndim = len(place.shape)  # `QuantizedWeight` counts axes from the end
    blocks = tuple((d - ndim, *sizes) for d, sizes in sorted(runs.blocks.items()))
    along = tuple(d - ndim for d in runs.along)
    options = tuple(getattr(coded.format, name) for name in _settings(coded.format))
    return QuantizedWeight(arrays, coded.format.name, options, blocks, along, np.dtype(dtype).name)


def _settings(format: Format) -> list[str]:
    return [name for name in format.settings() if name != "format"]


def targets(weight: QuantizedWeight) -> dict[str, Target]:
    """The arrays of a quantized weight to build, by name."""
    out, labels = weight.labels()
    return {n: Target(labels[n], out, weight.arrays[n].dtype) for n in weight.names}


def plain_target(place: Place, dtype: Any) -> Target:
    """The only array of a parameter stored as floats."""
    blocks = Blocks.of(place.shape, {}, ())
    return Target(blocks.codes, blocks.out, dtype)


def packing(place: Place, target: Target) -> Packed | None:
    """How a 4-bit array is packed into bytes on its way to a device; None for other dtypes."""
    if np.dtype(target.dtype).name not in DTYPES:
        return None
    first = _first(place, target)
    stack = [target.out[d][0] for d in place.stack]
    order = [k for k, label in enumerate(target.labels) if label not in stack and label != first]
    if first is not None:
        order.append(target.labels.index(first))
    even = [k for k in order if target.shape[k] % 2 == 0]
    return Packed(np.dtype(target.dtype), target.shape, even[0] if even else None)


def _first(place: Place, target: Target) -> Any:
    """The label that rows are read along."""
    groups = _present(place, target)
    return groups[0][0] if groups and groups[0] else None


def _present(place: Place, target: Target) -> list[list[Any]]:
    """The labels of the array that each axis of the tensor combines."""
    return [
        [label for d in group for label in target.out[d] if label in target.labels]
        for group in place.whole
    ]


def assemble(
    place: Place, target: Target, parts: Mapping[tuple[int, ...], Part], packed: Packed | None
) -> Array:
    """The whole array, from the part of each stacked module; as bytes if `packed` is given."""
    if packed is None:
        whole = np.empty(target.shape, target.dtype)
    else:
        whole = np.empty(packed.bytes_shape, np.uint8)
    stack = [target.labels.index(target.out[d][0]) for d in place.stack]
    for index, part in parts.items():
        where: list[Any] = [slice(None)] * whole.ndim
        for axis, entry in zip(stack, index, strict=True):
            where[axis] = entry
        _fill(place, target, part, whole[tuple(where)] if where else whole, packed)
    return whole


def _fill(place: Place, target: Target, part: Part, view: Array, packed: Packed | None) -> None:
    """Writes one tensor into its entry of the stack."""
    groups = _present(place, target)
    stack = [target.out[d][0] for d in place.stack]
    rest = [label for label in target.labels if label not in stack]
    takes = [_entries(place, target, t, part.grains[t]) for t in range(len(groups))]
    shown = [label for group in groups for label in group]
    order = [shown.index(label) for label in rest]
    axis = None
    if packed is not None and packed.axis is not None:
        axis = rest.index(target.labels[packed.axis])
    first = groups[0][0] if groups and groups[0] else None
    position = None if first is None else rest.index(first)
    each = 1 if first is None else len(takes[0]) // first.size
    for begin, end in _steps(first, math.prod(label.size for label in rest), axis == position):
        rows = takes[0][begin * each : end * each]
        block = _rows(part, rows)
        for t, take in enumerate(takes[1:], 1):
            if not np.array_equal(take, np.arange(block.shape[t])):
                block = np.take(block, take, t)
        sizes = [end - begin if label == first else label.size for label in shown]
        block = block.reshape(sizes).transpose(order)
        if packed is not None:
            block = packed._replace(shape=block.shape, axis=axis).pack_host(block)
        where: list[Any] = [slice(None)] * view.ndim
        if position is not None:
            half = 2 if axis == position else 1
            where[position] = slice(begin // half, -(-end // half))
        view[tuple(where)] = block


def _steps(first: Any, size: int, is_packed: bool) -> list[tuple[int, int]]:
    """The ranges of rows to read in turn, so that few entries are unpacked at a time."""
    if first is None:
        return [(0, 1)]
    most = min(max(size // 128, _FEWEST), _MOST)
    step = max(1, most * first.size // max(size, 1))
    step += step % 2 if is_packed else 0
    return [(k, min(k + step, first.size)) for k in range(0, first.size, step)]


def _rows(part: Part, rows: Array) -> Array:
    """Some rows of an array of the file; `rows` is sorted, and may repeat a row."""
    begin, end = int(rows[0]), int(rows[-1]) + 1
    block = part.read(slice(begin, end))
    if len(rows) == end - begin:
        return block
    return np.take(block, rows - begin, 0)


def _entries(place: Place, target: Target, t: int, grain: int) -> Array:
    """The index in the file of each entry of the array, along one axis of the tensor."""
    starts = np.zeros(1, np.int64)
    for d in place.whole[t]:
        for label in target.out[d]:
            starts = starts[:, None] * label.size
            if label in target.labels:
                starts = starts + np.arange(label.size)
            starts = starts.reshape(-1)
    return starts // grain


def check_shape(place: Place, name: str, shape: tuple[int, ...]) -> None:
    """Rejects a tensor whose shape does not match the parameter's."""
    wanted = tuple(math.prod(place.shape[d] for d in group) for group in place.whole)
    if shape != wanted:
        raise UnsupportedAdapterError(
            f"has `{name}` of shape {shape}; `{place.path}` of shape {place.shape} takes {wanted}."
        )


@functools.lru_cache(maxsize=256)
def with_along(format: Format, along: tuple[int, ...]) -> Format:
    """The format, with scales shared along these axes."""
    return dataclasses.replace(format, along=along)  # pyright: ignore[reportArgumentType]

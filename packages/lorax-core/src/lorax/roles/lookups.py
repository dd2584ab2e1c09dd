"""Lookups: an axis that is indexed is an input, and axes that are kept are outputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.extend.core as jex

from .values import DATA, Axis, Part, Value, blank, fitted, merge, same
from .walk import Strength, Walk, rule, shape_of


@rule("gather")
def _gather(walk: Walk, eqn: jex.JaxprEqn, table: Value, indices: Value) -> Value:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, index_sizes = shape_of(eqn.outvars[0]), shape_of(eqn.invars[1])[:-1]
    offsets = set(numbers.offset_dims)
    batch = [d for d in range(len(shape)) if d not in offsets]  # the axes of the indices, in order
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = dict(
        zip((d for d in range(len(sizes)) if d not in dropped), numbers.offset_dims, strict=True)
    )
    kept |= {
        d: batch[k]
        for d, k in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        )
    }
    # Axes of which an index picks one entry: inputs, if the index is data or an array.
    picked = [d for d in numbers.start_index_map if same(sizes[d], 1)]
    # More than one index, as with the tokens of a sequence.
    many = any(not same(size, 1) for size in index_sizes)
    value = _looked_up(walk, eqn, table, picked, kept, many, indices)

    def of_indices(axes: Sequence[Axis]) -> list[Axis]:
        out = list(map(blank, shape))
        for k, position in enumerate(batch):
            out[position] = axes[k]
        return out

    index_parts = {key: part.move(of_indices) for key, part in indices.parts.items() if key is DATA}
    return merge([value, Value(index_parts, indices.uses)])


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: jex.JaxprEqn, table: Value, *starts: Value) -> Value:
    sizes = eqn.params["slice_sizes"]
    full = shape_of(eqn.invars[0])
    picked = [
        d
        for d, size in enumerate(sizes)
        if same(size, 1) and not same(full[d], 1) and starts[d].data
    ]
    kept = {d: d for d in range(len(sizes))}
    value = _looked_up(walk, eqn, table, picked, kept, False, merge(starts))
    scalars = [
        start.move(lambda _: map(blank, shape_of(eqn.outvars[0]))) for start in starts if start.data
    ]
    return merge([value, *scalars])


def _looked_up(
    walk: Walk, eqn: jex.JaxprEqn, table: Value, picked: Sequence[int], kept: Mapping[int, int],
    many: bool, indices: Value,
) -> Value:  # fmt: skip
    """Returns entries of a table with axes `kept` in the result; records lookups of rows.

    A single constant index picks a layer. If a matrix is left, such as that of an expert, the
    product that follows determines the roles.
    """
    shape = shape_of(eqn.outvars[0])
    parts: dict[Any, Part] = {}
    uses = table.uses
    for key, part in table.parts.items():
        axes = list(map(blank, shape))
        for d, position in kept.items():
            if d not in picked:
                axes[position] = part.axes[d]
        left = dataclasses.replace(part, axes=fitted(axes, shape))
        inputs = part.along(picked)
        if key is DATA or not inputs or not (many or indices.data):
            parts[key] = left
            continue
        outputs = left.along(range(len(shape)))
        # A looked-up row [embed] is data from here on. A matrix that is picked from a stack, such
        # as that of an expert, is still a weight.
        is_row = len(left.shown) < 2
        strength = Strength.DATA if is_row and indices.data else Strength.WEIGHTS
        if is_row or outputs:
            uses |= walk.record(key, strength, inputs, outputs, eqn)
        if not is_row:
            parts[key] = left
    return Value(parts, uses)

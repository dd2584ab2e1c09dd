"""Selects entries of a weight: `gather` (embedding lookups, row selects) and `dynamic_slice`.

Every factor that owns an indexed axis is indexed by the part of the indices for that axis; the
other factors complete the product. Out-of-range indices keep their meaning, because it is decided
per axis: clipping clips all owners of an axis in the same way. If the model fills, each owner fills
with zeros, so the term is zero there, and the fill value of the base remains.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from .._factored import FactoredArray
from .._registry import defmove, defrule, defstructural
from .._terms import Inexpressible, Label, Term
from .structural import cut


def _dynamic_slice(term: Term, *starts, slice_sizes) -> Term:
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        if size == term.shape[axis]:
            continue
        # (a @ b)[start : start + size]  =  a[start : start + size] @ b
        try:
            term, label = term.fuse(axis)
        except Inexpressible:
            if size != 1:
                raise
            term = _entry(term, axis, start)
            continue

        def change(factor, k, start=start, size=size):
            return jax.lax.dynamic_slice_in_dim(factor, start, size, k)

        term, _ = term.along(label, change, size)
    return term


def _entry(term: Term, axis: int, start: jax.Array) -> Term:
    """Picks one entry of an axis of several labels: row 7 of blocks of 3 is row 1 of block 2."""
    # Like `dynamic_slice`, this takes the nearest entry for an index out of range.
    start = jnp.clip(start, 0, term.shape[axis] - 1)
    labels = term.out[axis]
    for k, label in enumerate(labels):
        unit = math.prod(inner.size for inner in labels[k + 1 :])

        def change(factor, d, index=start // unit % label.size):
            return jax.lax.dynamic_slice_in_dim(factor, index, 1, d)

        term, _ = term.along(label, change, 1)
    return term


defstructural("dynamic_slice", _dynamic_slice)


@defrule("gather", gains=True)
def _gather(
    eqn,
    weight,
    indices,
    *,
    dimension_numbers,
    slice_sizes,
    unique_indices,
    indices_are_sorted,
    mode,
    fill_value,
):
    if not isinstance(weight, FactoredArray) or isinstance(indices, FactoredArray):
        return NotImplemented

    def looked_up(term: Term) -> Term:
        arguments = _split_indices(term, indices, dimension_numbers, slice_sizes, mode)
        picked = _gather_term(*arguments, mode)
        return picked if arguments[0] is term else _rows(picked)

    moved = weight.moved(looked_up)
    # A single index picks a layer or an expert; an array of indices looks up rows.
    # A row has at most one axis with more than one entry left.
    left = [size for d, size in enumerate(eqn.out_shape) if d in dimension_numbers.offset_dims]
    are_rows = indices.ndim > 1 and sum(size != 1 for size in left) < 2
    finished = weight.is_bare and are_rows
    return eqn.rows_or_weight(moved.replace_base(eqn(weight.base, indices)), finished=finished)


@defmove("gather")
def _gather_codes(
    term: Term,
    indices,
    *,
    dimension_numbers,
    slice_sizes,
    unique_indices,
    indices_are_sorted,
    mode,
    fill_value,
) -> Term:
    """Looks codes up as if every index were in range, and multiplies the others by NaN."""
    numbers, fills = dimension_numbers, mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    # Filling with NaN is a gain of NaN; no gain turns a code into another number.
    if fills and fill_value is not None and fill_value == fill_value:
        raise Inexpressible("fills with a number")
    clip = jax.lax.GatherScatterMode.CLIP if fills else mode
    looked_up = _gather_term(*_split_indices(term, indices, numbers, slice_sizes, clip), clip)
    if not fills:
        return looked_up
    # The largest start index at which the slice is inside the array.
    limits = [term.shape[d] - slice_sizes[d] for d in numbers.start_index_map]
    limits = jnp.asarray(limits, indices.dtype).reshape((1,) * (indices.ndim - 1) + (-1,))
    in_range = jnp.all((indices >= 0) & (indices <= limits), -1)  # [*batch]
    batch = [d for d in range(len(looked_up.out)) if d not in numbers.offset_dims]
    # [*batch]: one more factor, so that codes are still decoded only for rows that are used
    gain = jnp.where(in_range, jnp.float32(1), jnp.float32(jnp.nan))
    return looked_up.times(gain, tuple(looked_up.out[d][0] for d in batch))


def _split_indices(term: Term, indices, numbers, slice_sizes, mode):
    """Returns the same lookup, with several axes for an indexed axis of several owners.

    Row 7 of blocks of 3 is row 1 of block 2, so each of these axes has its own column of indices.
    """
    several = []
    for d in numbers.start_index_map:
        try:
            term.fuse(d)
        except Inexpressible:
            several.append(d)
    if not several:
        return term, indices, numbers, slice_sizes
    if any(slice_sizes[d] != 1 or d not in numbers.collapsed_slice_dims for d in several):
        raise Inexpressible
    for d in several:
        term = term.own(term.out[d][0])
    out: list[tuple[Label, ...]] = []
    axes: dict[int, list[int]] = {}
    for d, labels in enumerate(term.out):
        parts = [(label,) for label in labels] if d in several else [labels]
        axes[d] = list(range(len(out), len(out) + len(parts)))
        out += parts
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    columns, indexed = [], []
    for column, d in enumerate(numbers.start_index_map):
        # index [*batch] -> one column for each label: index // unit, then the remainder
        index = indices[..., column]
        if mode != jax.lax.GatherScatterMode.FILL_OR_DROP:
            # Also for indices that are promised to be in bounds, as those of `w[i]` are: JAX takes
            # the nearest entry for others.
            index = jnp.clip(index, 0, term.shape[d] - 1)
        sizes = [math.prod(label.size for label in out[k]) for k in axes[d]]
        for k, axis in enumerate(axes[d]):
            # For an index out of range, the first part is out of range as well.
            unit = math.prod(sizes[k + 1 :])
            # Row-major: the quotient is the block, the remainder the place within it.
            part = index // unit
            columns.append(part if k == 0 else part % sizes[k])
            indexed.append(axis)
    numbers = numbers._replace(
        collapsed_slice_dims=tuple(k for d in numbers.collapsed_slice_dims for k in axes[d]),
        start_index_map=tuple(indexed),
        operand_batching_dims=tuple(axes[d][0] for d in numbers.operand_batching_dims),
    )
    sizes = tuple(slice_sizes[d] for d in axes for _ in axes[d])
    return dataclasses.replace(term, out=tuple(out)), jnp.stack(columns, -1), numbers, sizes


def _rows(term: Term) -> Term:
    """Multiplies rows of a Kronecker product into one factor: they are as large as the base's."""
    if sum(any(not label.is_index for label in axis) for axis in term.out) > 1:
        return term
    owned = tuple(label for label in term.shown if term.owners(label))
    # [*batch, …] · … -> [*batch, features]
    return term.multiplied(range(len(term.factors)), owned)


def _gather_term(term: Term, indices, numbers, slice_sizes, mode) -> Term:
    paired = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    indexed = dict(zip(numbers.start_index_map, range(indices.shape[-1]), strict=True))
    for axis, size in enumerate(slice_sizes):
        # An axis without indices is only cut to the size of the slice, from its start.
        if axis not in paired and axis not in indexed:
            term = cut(term, axis, 0, size)
    term, _ = term.fuse_all((*paired, *indexed))
    label_of = {axis: term.out[axis][0] for axis in (*paired, *indexed)}
    # The result has the axes of `indices`, [*batch], and those of a slice, [*windows].
    batch: list[Label] = []
    for d, size in enumerate(indices.shape[:-1]):
        axis = next((axis for axis, position in paired.items() if position == d), None)
        new = term.fresh(size, skip=d)._replace(is_index=True)
        batch.append(new if axis is None else label_of[axis])
    # An indexed axis of the result is as long as the slice.
    windows = {
        axis: term.fresh(slice_sizes[axis], skip=len(batch) + k) for k, axis in enumerate(indexed)
    }
    picked = [
        _gather_factor(
            factor, labels, indices, batch, paired, indexed, label_of, windows, slice_sizes,
            numbers.collapsed_slice_dims, mode,
        )
        for factor, labels in zip(term.factors, term.labels, strict=True)
    ]  # fmt: skip
    shown = [
        (windows[axis],) if axis in indexed else labels
        for axis, labels in enumerate(term.out)
        if axis not in numbers.collapsed_slice_dims and axis not in paired
    ]
    # `offset_dims` are the places of the slice's axes in the result; the batch has the others.
    out, rest = [], [(label,) for label in batch]
    for d in range(len(shown) + len(rest)):
        out.append(shown.pop(0) if d in numbers.offset_dims else rest.pop(0))
    return dataclasses.replace(
        term,
        factors=tuple(factor for factor, _ in picked),
        labels=tuple(labels for _, labels in picked),
        out=tuple(out),
    )


def _gather_factor(
    factor, labels, indices, batch, paired, indexed, label_of, windows, slice_sizes, collapsed, mode
):
    """Indexes one factor by the part of the indices that runs over the axes that it owns."""
    mine = {axis: labels.index(label_of[axis]) for axis in indexed if label_of[axis] in labels}
    # E [vocab, embed] = a [vocab, rank] · b [rank, embed]: only a is looked up.
    if not mine:
        return factor, labels
    batching = {axis: labels.index(label_of[axis]) for axis in paired if label_of[axis] in labels}
    sizes = list(factor.shape)
    for axis, k in mine.items():
        sizes[k] = slice_sizes[axis]
    for k in batching.values():
        # A paired axis has one entry per index.
        sizes[k] = 1
    # A collapsed axis has one entry in the slice, and no axis in the result.
    gone = tuple(k for axis, k in mine.items() if axis in collapsed)
    kept = [k for k in range(factor.ndim) if k not in gone and k not in batching.values()]
    names = {k: windows[axis] for axis, k in mine.items()}
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(batch), len(batch) + len(kept))),
        collapsed_slice_dims=tuple(sorted(gone)),
        start_index_map=tuple(mine.values()),
        operand_batching_dims=tuple(sorted(batching.values())),
        start_indices_batching_dims=tuple(
            paired[axis] for axis, _ in sorted(batching.items(), key=lambda item: item[1])
        ),
    )
    # Only the columns of the indices that run over axes of this factor.
    columns = [indexed[axis] for axis in mine]
    part = indices if columns == list(range(indices.shape[-1])) else indices[..., columns]
    with jax.named_scope("lora"):
        # a [vocab, rank] by indices [*batch, 1] -> [*batch, rank]
        rows = jax.lax.gather(factor, part, numbers, sizes, mode=mode, fill_value=0)
    return rows, (*batch, *(names.get(k, labels[k]) for k in kept))

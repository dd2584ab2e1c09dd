"""Primitives that move, join, cut or drop axes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from .values import Axis, Value, blank, merge, regroup, resized, without
from .walk import Strength, Walk, rule, shape_of


@rule("transpose")
def _transpose(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    return value.move(lambda axes: (axes[d] for d in eqn.params["permutation"]))


@rule("reshape")
def _reshape(walk: Walk, eqn: jex.JaxprEqn, value: Value, *_: Value) -> Value:
    def move(axes: Sequence[Axis]) -> list[Axis]:
        order = eqn.params["dimensions"] or range(len(axes))
        return regroup([axes[d] for d in order], shape_of(eqn.outvars[0]))

    return value.move(move)


@rule("squeeze")
def _squeeze(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    return value.move(lambda axes: without(axes, eqn.params["dimensions"]))


@rule("broadcast_in_dim")
def _broadcast_in_dim(walk: Walk, eqn: jex.JaxprEqn, value: Value, *_: Value) -> Value:
    def spread(axes: Sequence[Axis]) -> list[Axis]:
        # New and stretched axes show nothing.
        out = list(map(blank, shape_of(eqn.outvars[0])))
        for axis, position in zip(axes, eqn.params["broadcast_dimensions"], strict=True):
            out[position] = axis
        return out

    return value.move(spread)


@rule(
    "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax",
    "argmin",
)  # fmt: skip
def _reduce(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    return value.move(lambda axes: without(axes, eqn.params["axes"]))


@rule("reduce_sum")
def _reduce_sum(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    """Handles a sum of a weight times data as a product, as in `(w * x).sum(0)`."""
    summed = eqn.params["axes"]
    parts, uses = dict(value.parts), value.uses
    for name, part in value.weights.items():
        # (w * x).sum(0) sums the same axis of w and of data: its inputs, as in a product.
        meets_data = value.data is not None and not value.data.shown.isdisjoint(summed)
        inputs, outputs = part.along(summed), part.along(part.shown.difference(summed))
        if meets_data and inputs and outputs and not part.joined and not part.links:
            uses |= walk.record(name, Strength.DATA, inputs, outputs, eqn)
            del parts[name]
    return Value(parts, uses).move(lambda axes: without(axes, summed))


@rule("split")
def _split(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> list[Value]:
    return [resized(value, shape_of(v)) for v in eqn.outvars]


@rule("concatenate")
def _concatenate(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> Value:
    return walk.beside(eqn, [resized(value, shape_of(eqn.outvars[0])) for value in values])


@rule("stack")
def _stack(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> Value:
    axis = eqn.params["axis"]

    def widened(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return (*axes[:axis], blank(len(values)), *axes[axis:])

    return walk.beside(eqn, [value.move(widened) for value in values])


@rule("select_n")
def _select_n(walk: Walk, eqn: jex.JaxprEqn, which: Value, *cases: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    # A scalar condition has no axes: it is constant along all of the result's.
    which = which if shape_of(eqn.invars[0]) else which.move(lambda _: map(blank, shape))
    return walk.join([which, walk.beside(eqn, cases)], eqn)


@rule("unstack")
def _unstack(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> list[Value]:
    return [value.move(lambda axes: without(axes, [eqn.params["axis"]]))] * len(eqn.outvars)


@rule("fft")
def _fft(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    last = len(eqn.params["fft_lengths"])
    parts = {
        key: dataclasses.replace(
            part,
            # A Fourier transform runs along the last axes, whose entries are frequencies from here
            # on.
            transformed=part.transformed | part.along(range(len(part.axes) - last, len(part.axes))),
        )
        for key, part in value.parts.items()
    }
    return resized(Value(parts, value.uses), shape_of(eqn.outvars[0]))


@rule("triangular_solve", "custom_linear_solve", "pallas_call")
def _not_followed(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> list[Value]:
    return [merge(walk.lost(eqn, value, shape_of(v)) for value in values) for v in eqn.outvars]


@rule("all_gather", "all_gather_invariant", "all_gather_reduced")
def _all_gather(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> list[Value]:
    axis = eqn.params["all_gather_dimension"]

    def gathered(value: Value, shape: Sequence[Any]) -> Value:
        if not eqn.params["tiled"]:
            value = value.move(lambda axes: (*axes[:axis], blank(shape[axis]), *axes[axis:]))
        return resized(value, shape)

    return [gathered(value, shape_of(v)) for value, v in zip(values, eqn.outvars, strict=True)]


@rule("reduce_scatter", "unreduced_reduce_scatter")
def _reduce_scatter(walk: Walk, eqn: jex.JaxprEqn, value: Value) -> Value:
    axis = eqn.params["scatter_dimension"]
    if not eqn.params["tiled"]:
        value = value.move(lambda axes: without(axes, [axis]))
    return resized(value, shape_of(eqn.outvars[0]))


@rule(
    "dynamic_update_slice", "scatter", "scatter-add", "scatter-mul", "scatter-sub", "scatter-min",
    "scatter-max",
)  # fmt: skip
def _update(walk: Walk, eqn: jex.JaxprEqn, operand: Value, *others: Value) -> Value:
    shape = shape_of(eqn.outvars[0])
    spread = [resized(operand, shape)]
    for other, v in zip(others, eqn.invars[1:], strict=True):
        # A scatter's updates and indices may have other axes than its operand.
        follows = len(shape_of(v)) == len(shape) and (operand.data or not other.data)
        spread.append(resized(other, shape) if follows else walk.lost(eqn, other, shape))
    return walk.beside(eqn, spread) if operand.data else merge(spread)

"""Products: axes that are summed over are inputs, and axes that are kept are outputs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from .values import DATA, Axis, Link, Part, Span, Value, blank, divides, fitted, merge
from .walk import Strength, Walk, rule, shape_of


class Side(NamedTuple):
    """One operand of a product.

    Attributes:
        value: the operand.
        sizes: its shape.
        summed: the axes that are summed over.
        kept: maps each kept axis to its position in the result.
        batch: maps each batched axis to its position in the result.
    """

    value: Value
    sizes: Sequence[Any]
    summed: Sequence[int]
    kept: Mapping[int, int]
    batch: Mapping[int, int]

    @property
    def batched(self) -> bool:
        """Whether the product has separate entries along some of this side's axes."""
        return any(self.sizes[d] != 1 for d in self.batch)

    @property
    def has_more_axes(self) -> bool:
        """Whether this side keeps axes along which none of its weights runs."""
        shown = frozenset[int]().union(*(part.shown for part in self.value.weights.values()))
        return any(self.sizes[d] != 1 and d not in shown for d in (*self.kept, *self.batch))

    @property
    def varying(self) -> Part:
        """The axes along which a result that depends on data varies: all but repeated ones."""
        parts = self.value.parts.values()
        repeated = {d for d in range(len(self.sizes)) if not any(d in part.shown for part in parts)}
        return Part(
            tuple(
                blank(size) if d in repeated and parts else (Span(size, frozenset((d,))),)
                for d, size in enumerate(self.sizes)
            )
        )

    def place(self, part: Part, shape: Sequence[Any], carried: "Side | None" = None) -> Part:
        """Returns the part that the result shows.

        A constant maps one axis to another, as a resize does. Beside a constant, the summed axes
        are carried over to the axis that the constant keeps.
        """
        # The axes that the product keeps, at their places in the result.
        axes = list(map(blank, shape))
        for d, position in (*self.kept.items(), *self.batch.items()):
            axes[position] = part.axes[d]
        if carried is not None and carried.kept:
            position = next(iter(carried.kept.values()))
            axes[position] = (Span(shape[position], part.along(self.summed)),)
        return dataclasses.replace(part, axes=fitted(axes, shape))


def meet(walk: Walk, eqn: jex.JaxprEqn, left: "Side", right: "Side", shape: Sequence[Any]) -> Value:
    """Returns the value of a product that sums over some axes of both sides."""
    # x [batch, in] · w [in, out]: summed axes of w are its inputs, kept axes its outputs.
    uses = left.value.uses | right.value.uses
    # Of two weights, the one with additional axes (such as learned queries) is mapped by the other.
    left_is_mapped = left.has_more_axes or not right.has_more_axes
    placed: list[Value] = []
    for side, other, is_mapped in (
        (left, right, left_is_mapped), (right, left, not left_is_mapped)
    ):  # fmt: skip
        parts: dict[Any, Part] = {}
        if left.value.data or right.value.data:
            parts[DATA] = side.place(side.varying, shape)
        for name, part in side.value.weights.items():
            inputs, outputs = part.along(side.summed), part.along(side.kept)
            if other.value.data and name not in other.value.parts:
                # An entrywise product with data came first, so this use is weaker evidence.
                if part.joined or part.beside:
                    uses |= walk.record(name, Strength.JOINED, inputs, outputs, eqn, part.beside)
                elif not part.links:
                    uses |= walk.record(name, Strength.DATA, inputs, outputs, eqn)
                elif inputs and not side.batched:
                    uses |= record_chain(walk, name, side.value, inputs, side.kept, eqn)
            elif other.value.weights:
                if part.beside:
                    walk.leave_to_data(part)
                    continue
                # Remember which axes met, in case data meets the product later.
                links = {
                    Link(inputs, key, mapped.along(other.summed))
                    for key, mapped in other.value.weights.items()
                    if inputs and mapped.along(other.summed)
                }
                part = dataclasses.replace(part, links=part.links | links)
                parts[name] = side.place(part, shape)
                if name in other.value.parts or part.joined or side.value.data:
                    continue
                if is_mapped:
                    walk.note(
                        name,
                        "it is combined only with other weights, in "
                        f"`{eqn.primitive.name}`{walk.place}",
                    )
                else:
                    uses |= walk.record(name, Strength.WEIGHTS, inputs, outputs, eqn)
            else:
                if inputs and outputs:
                    uses |= walk.record(name, Strength.CONSTANT, inputs, outputs, eqn)
                parts[name] = side.place(part, shape, carried=other)
        placed.append(Value(parts, uses))
    return dataclasses.replace(merge(placed), uses=uses)


def record_chain(
    walk: Walk, name: str, value: Value, inputs: frozenset[int], kept: Iterable[int], eqn: Any
) -> int:
    """Records the uses of weights that were multiplied with each other before the data."""
    uses, seen, entries = 0, {name}, [(name, inputs)]
    while entries:
        name, inputs = entries.pop()
        part = value.weights[name]
        # In x · (a · b), the inputs of a meet x. Its axes that meet b are its outputs, and b is
        # followed from there.
        linked = frozenset[int]().union(*(link.axes for link in part.links))
        outputs = (part.along(kept) | linked) - inputs
        uses |= walk.record(name, Strength.CHAIN, inputs, outputs, eqn)
        for link in part.links:
            if link.other not in seen and link.other in value.weights:
                seen.add(link.other)
                entries.append((link.other, link.other_axes))
    return uses


@rule("dot_general")
def _dot_general(walk: Walk, eqn: jex.JaxprEqn, left: Value, right: Value) -> Value:
    return _product(walk, eqn, left, right, eqn.params["dimension_numbers"])


def _product(
    walk: Walk,
    eqn: jex.JaxprEqn,
    left: Value,
    right: Value,
    numbers: Any,
    groups: Sequence[int] = (),
) -> Value:
    (l_sum, r_sum), (l_batch, r_batch) = numbers
    l_sizes, r_sizes = (shape_of(v) for v in eqn.invars[:2])
    batch = range(len(l_batch))
    l_free = [d for d in range(len(l_sizes)) if d not in (*l_sum, *l_batch)]
    r_free = [d for d in range(len(r_sizes)) if d not in (*r_sum, *r_batch, *groups)]
    # The result is [*batch, *left's own, *right's own].
    l_kept = {d: len(l_batch) + k for k, d in enumerate(l_free)}
    r_kept = {d: len(l_batch) + len(l_free) + k for k, d in enumerate(r_free)}
    return meet(
        walk,
        eqn,
        Side(left, l_sizes, l_sum, l_kept, dict(zip(l_batch, batch, strict=True))),
        Side(right, r_sizes, r_sum, r_kept, dict(zip(r_batch, batch, strict=True))),
        shape_of(eqn.outvars[0]),
    )


@rule("ragged_dot_general", "ragged_dot")
def _ragged_dot(
    walk: Walk, eqn: jex.JaxprEqn, left: Value, right: Value, group_sizes: Value, *_: Value
) -> Value:
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None or numbers.lhs_ragged_dimensions[0] in numbers.dot_dimension_numbers[0][0]:
        return merge(walk.lost(eqn, value, shape_of(eqn.outvars[0])) for value in (left, right))
    dots, groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    return _product(walk, eqn, left, right, dots, groups)


@rule("conv_general_dilated")
def _convolution(walk: Walk, eqn: jex.JaxprEqn, left: Value, right: Value) -> Value:
    numbers = eqn.params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    # rhs_spec is (out, in, *window): all but the first are inputs of the kernel.
    outputs, *inputs = numbers.rhs_spec
    out_batch, out_features, *out_space = numbers.out_spec
    l_sizes, r_sizes = (shape_of(v) for v in eqn.invars)
    kept = {batch: out_batch, **dict(zip(space, out_space, strict=True))}
    # The kernel's output axis runs over the groups, and its input axis within one.
    right = right.move(lambda axes: _ungrouped(axes, outputs, eqn.params["feature_group_count"]))
    return meet(
        walk,
        eqn,
        Side(left, l_sizes, [features], kept, {}),
        Side(right, r_sizes, inputs, {outputs: out_features}, {}),
        shape_of(eqn.outvars[0]),
    )


def _ungrouped(axes: Sequence[Axis], axis: int, groups: int) -> list[Axis]:
    """Clears marks along the output axis that run over the groups, which both sides have."""
    spans = list(axes[axis])
    for k, span in enumerate(spans[:-1]):
        # As many leading parts of the output axis as make up the number of groups.
        if not divides(span.size, groups):
            break
        groups //= span.size
        spans[k] = span._replace(axes=frozenset())
    return [tuple(spans) if d == axis else other for d, other in enumerate(axes)]

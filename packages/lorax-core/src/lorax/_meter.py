"""Sums statistics over the inputs of any weight in one traced pass.

    moments  =  Σ x xᵀ,  Σ x,  Σ 1        over all rows x that meet an entry of the shared axes

The moments are the derivative with respect to zeros that change nothing: `read` returns the operand
unchanged, and its backward pass gives the moments as the gradient of the zeros. So `jax.grad` adds
them up over all uses of a weight, and through `scan`, `vmap` and `remat`, like any gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._contract import contract, wide_dtype
from ._terms import Inexpressible, Label, Labels, Term
from ._turn import arranged

Moments = tuple[jax.Array, jax.Array, jax.Array]

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meter:
    """The zeros of one weight that receive its moments as their gradient.

    Attributes:
        term: its factors are the zeros, `[*shared, *rows, *columns]`, `[*shared, *rows]` and
            `[*shared]`. No axis of the weight shows rows or columns.
        labels: the labels of the weight's inputs. No factor owns them, so anything that cuts the
            inputs replaces one of them, which `moved_to` detects.
        is_scaled: whether each operand is divided by the magnitude of its maximum first.
    """

    term: Term
    labels: Labels = dataclasses.field(metadata={"static": True})
    is_scaled: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        zeros: Moments,
        out: tuple[Labels, ...],
        shared: Labels,
        inputs: Labels,
        source: str,
        is_scaled: bool,
    ) -> "Meter":
        """Returns the meter of a weight whose axes have the labels `out`."""
        # Axis d of the weight has label d, so unused labels begin at `len(out)`.
        first = len(out)
        count = len(inputs)
        rows = tuple(Label(first + k, label.size) for k, label in enumerate(inputs))
        columns = tuple(Label(first + count + k, label.size) for k, label in enumerate(inputs))
        # second [*shared, in, in], first [*shared, in], count [*shared]: Σ x xᵀ, Σ x and Σ 1
        labels = ((*shared, *rows, *columns), (*shared, *rows), shared)
        return cls(Term(tuple(zeros), labels, out, (source,)), inputs, is_scaled)

    @property
    def axes(self) -> list[int]:
        """The input axes of the weight."""
        return [d for d, labels in enumerate(self.term.out) if {*labels} & {*self.labels}]

    def moved_to(self, term: Term) -> "Meter":
        """Returns the same zeros with their term moved.

        Raises:
            Inexpressible: if some of the inputs are cut off or reordered.
        """
        shown = [label for label in term.shown if label in self.labels]
        if tuple(shown) != self.labels:
            raise Inexpressible("reads only a part of its inputs, or reads them in another order")
        return dataclasses.replace(self, term=term)

    def read(
        self,
        operand: jax.Array,
        places: Mapping[int, int],
        spread: Callable[[jax.Array], jax.Array] = lambda operand: operand,
        group_sizes: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the operand unchanged, with its moments as the gradient of the zeros.

        Args:
            operand: the array that meets the weight.
            places: maps each summed or batched axis of the weight to an axis of `spread(operand)`.
            spread: turns the operand into rows, such as the patches of a convolution.
            group_sizes: for `ragged_dot`, how many rows meet each entry of the shared axis.

        Raises:
            Inexpressible: if the inputs that meet the weight cannot be read.
        """
        shown = {*self.labels, *self.term.labels[2]}
        needed = [d for d, labels in enumerate(self.term.out) if shown.intersection(labels)]
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise Inexpressible(f"multiplies it by {operand.dtype}")
        if not all(d in places for d in needed):
            raise Inexpressible("reads it along its output axes")
        # A squeezed label of size one may be missing; any other means that entries were cut off.
        if any(x.size != 1 and x not in self.term.shown for x in self.term.labels[2]):
            raise Inexpressible("uses only a part of its shared axes")
        summed = _moments if group_sizes is None else _moments_of_groups
        zeros = self.term.factors
        # The smaller of the operand [n, in] and its moments [in, in] is kept for the backward
        # pass. In a loop, each step keeps its own.
        keeps_rows = operand.size <= sum(zero.size for zero in zeros)

        def moments(operand: jax.Array, group_sizes: jax.Array | None) -> Moments:
            rows = spread(operand).astype(wide_dtype(operand.dtype))
            if self.is_scaled:
                # |max(x)|, not max(|x|): PEFT's CorDA divides by the same number.
                largest = jnp.abs(jnp.max(rows))
                rows = rows / jnp.where(largest == 0, 1, largest).astype(rows.dtype)
            sums = summed(self.term, self.labels, rows, places, group_sizes, self.is_scaled)
            second, first, count = (
                x.astype(zero.dtype) for x, zero in zip(sums, zeros, strict=True)
            )
            return second, first, count

        @jax.custom_vjp
        def through(operand: Any, zeros: Any, group_sizes: Any) -> Any:
            return operand

        def forward(operand: Any, zeros: Any, group_sizes: Any) -> Any:
            kept = (operand, group_sizes) if keeps_rows else moments(operand, group_sizes)
            return operand, kept

        def backward(kept: Any, cotangent: Any) -> Any:
            # The "gradient" of the zeros is the moments: nothing else flows into them.
            return cotangent, moments(*kept) if keeps_rows else kept, None

        through.defvjp(forward, backward)
        return through(operand, tuple(zeros), group_sizes)


def _renamed(meter: Term, inputs: Labels) -> tuple[dict[Label, Label], dict[Label, Label]]:
    """Maps the labels of the inputs to those of the rows, and to those of the columns."""
    ends = meter.labels[0][-2 * len(inputs) :]
    rows, columns = ends[: len(inputs)], ends[len(inputs) :]
    return dict(zip(inputs, rows, strict=True)), dict(zip(inputs, columns, strict=True))


def _moments(term: Term, inputs: Labels, rows, places, group_sizes, once: bool) -> Moments:
    """Sums over all axes of the operand that the zeros do not have."""
    array, out, _ = arranged(term, rows, places)
    flat = tuple(label for labels in out for label in labels)
    as_rows, as_columns = _renamed(term, inputs)
    # x [n, rows] · x [n, columns] -> [rows, columns], by two names for the same axis
    left = tuple(as_rows.get(label, label) for label in flat)
    right = tuple(as_columns.get(label, label) for label in flat)
    second, first, shared = term.labels
    # Rows per shared entry: everything that is neither a shared entry nor an input.
    count = array.size // _size(shared) // _size(inputs)

    def summed(several: list[tuple[jax.Array, Labels]], labels: Labels) -> jax.Array:
        # Labels that a squeeze has dropped have one entry; the reshape below puts them back.
        met = tuple(x for x in labels if any(x in owned for _, owned in several))
        total = contract(several, met, dtype=array.dtype, precision=_HIGHEST)
        return total.reshape([label.size for label in labels])

    return (
        summed([(array, left), (array, right)], second),
        summed([(array, left)], first),
        # Scaled operands are counted once per read, not once per row.
        jnp.full([label.size for label in shared], 1 if once else count, array.dtype),
    )


def _moments_of_groups(term: Term, inputs: Labels, rows, places, group_sizes, once) -> Moments:
    """Sums over the rows of each group of `ragged_dot`."""
    second, first, shared = term.labels
    as_rows, as_columns = _renamed(term, inputs)
    order = (*shared, *as_rows.values(), *as_columns.values())
    # The rows are [n, in]: axis 1 of the operand must be all inputs in order.
    met = [labels for d, labels in enumerate(term.out) if d in places and places[d] == 1]
    if rows.ndim != 2 or len(shared) != 1 or met != [inputs] or second != order:
        raise Inexpressible("has rows in an unknown order")
    numbers = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])

    def summed(right: jax.Array, labels: Labels) -> jax.Array:
        # rows [n, in] · right [n, out], summed over the rows of each group -> [groups, in, out]
        product = jax.lax.ragged_dot_general(rows, right, group_sizes, numbers, precision=_HIGHEST)
        return product.reshape([label.size for label in labels])

    # rowsᵀ · 1 [in, 1] is the sum of the rows of a group.
    ones = jnp.ones((len(rows), 1), rows.dtype)
    counts = group_sizes > 0 if once else group_sizes
    return summed(rows, second), summed(ones, first), counts.astype(rows.dtype)


def _size(labels: Labels) -> int:
    return math.prod(label.size for label in labels)

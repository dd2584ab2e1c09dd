"""A block-diagonal matrix along one axis of a weight, as what it adds to the identity.

    W'[(n i), …]  =  W[(n i), …]  +  Σ_j matrix[n, i, j] · W[(n j), …]

It multiplies a weight without an array of the weight's size: what meets the weight along that axis
is multiplied first, or the result where the axis is kept.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import _contract
from ._terms import Inexpressible, Label, Labels, Term


def arranged(
    term: Term, array: jax.Array, places: Mapping[int, int]
) -> tuple[jax.Array, list[Labels], Iterator[int]]:
    """An array that meets a weight, with the labels that a term of the weight has there.

    Args:
        term: the term.
        array: what meets the weight.
        places: for each axis of the weight that the array has, the array's. The array may repeat
            it, as the groups of a convolution do.

    Returns:
        The array with an axis for each label, the labels of each of its axes before, and the
        numbers of labels that nothing has.
    """
    # The labels on each axis of the array.
    axes = {places[d]: term.out[d] for d in places}
    fresh = itertools.count(term.fresh(1).id)
    out: list[Labels] = []
    for axis, size in enumerate(array.shape):
        labels = axes.get(axis, ())
        repeats = size // math.prod(label.size for label in labels)
        # A convolution's groups repeat the axis, group by group: the most significant label.
        out.append((Label(next(fresh), repeats), *labels) if repeats != 1 else labels)
    flat = [label.size for labels in out for label in labels]
    return array.reshape(flat), out, fresh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """The matrix of one weight.

    Attributes:
        term: its first factor is the matrix, whose last two axes are the row and the column; no
            axis of the weight shows these. The other axes are those that the blocks vary along.
        label: of the weight's entries within a block. No factor owns it, so whatever moves or cuts
            the entries of a block replaces it, and `moved_to` notices.
    """

    term: Term
    label: Label = dataclasses.field(metadata={"static": True})

    @property
    def axis(self) -> int:
        """The weight's axis that is multiplied."""
        return next(d for d, labels in enumerate(self.term.out) if self.label in labels)

    @property
    def varying(self) -> list[int]:
        """The weight's axes that an operand must have: the multiplied one, and those of blocks."""
        return [
            d
            for d, labels in enumerate(self.term.out)
            if any(label == self.label or self.term.owners(label) for label in labels)
        ]

    @property
    def is_owned(self) -> bool:
        """Whether nothing is left of the weight that the matrix does not vary along."""
        return all(
            label == self.label or label.size == 1 or label.is_index or self.term.owners(label)
            for label in self.term.shown
        )

    def moved_to(self, term: Term) -> "Turn":
        """The same matrix with its term moved."""
        if not any(self.label in labels for labels in term.out):
            raise Inexpressible("reads a part of a block that an adapter multiplies as a whole")
        return dataclasses.replace(self, term=term)

    def factors(self, *, by_rows: bool, other: Label) -> list[_contract.Operand]:
        """The factors for what has `label` and is to have `other` in its place.

        `by_rows` says that it meets the rows of the matrix, as an operand of a product does. The
        weight, and a result, meet the columns.
        """
        (matrix, *more), ((*blocks, row, column), *rest) = self.term.factors, self.term.labels
        # R[row, column]: x · R meets rows, R · W and R · result meet columns.
        names = {row: self.label, column: other} if by_rows else {row: other, column: self.label}
        return [(matrix, (*blocks, names[row], names[column])), *zip(more, rest, strict=True)]

    def applied_to(
        self, array: jax.Array, places: Mapping[int, int], *, by_rows: bool = False, **keywords: Any
    ) -> jax.Array:
        """An array times the matrix.

        Args:
            array: the weight, or what meets it, or the result.
            places: for each axis of the weight that the array has, the array's. The groups of a
                convolution repeat it there.
            by_rows: as in `factors`.
            **keywords: of `contract`.
        """
        met, out, fresh = arranged(self.term, array, places)
        other = Label(next(fresh), self.label.size)
        flat = tuple(label for labels in out for label in labels)
        # array + array · (R − 1): the matrix is stored without its identity.
        operands = [(met, flat), *self.factors(by_rows=by_rows, other=other)]
        arrays, labels = zip(*operands, strict=True)
        turned = tuple(
            tuple(other if label == self.label else label for label in axis) for axis in out
        )
        term = Term(arrays, labels, turned)
        dtype = _contract.product_dtype(array.dtype)
        return term.added_to(array, dtype, meets=0, **keywords)

    def inverse(self) -> "Turn":
        """The matrix that undoes this one."""
        matrix, *more = self.term.factors
        around = tuple(range(matrix.ndim - 2))
        identity = jnp.expand_dims(jnp.eye(self.label.size, dtype=matrix.dtype), around)
        # (1 + M)⁻¹ = 1 + inverse, [*blocks, n, n]
        inverse = jnp.linalg.inv(identity + matrix) - identity
        term = dataclasses.replace(self.term, factors=(inverse, *more))
        return dataclasses.replace(self, term=term)

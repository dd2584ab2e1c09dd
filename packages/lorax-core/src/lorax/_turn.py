"""A block-diagonal matrix along one axis of a weight, stored as its difference from the identity.

    W'[(n i), …]  =  W[(n i), …]  +  Σ_j matrix[n, i, j] · W[(n j), …]

It multiplies a weight without an array of the weight's size: if the axis is summed over, the
operand is multiplied by the matrix instead; if the axis is kept, the result is.
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
    """Splits an array that meets a weight into one axis per label of the weight's term.

    Args:
        term: a term of the weight.
        array: the array that meets the weight.
        places: maps axes of the weight to axes of the array. The array may repeat such an axis, as
            the groups of a convolution do.

    Returns:
        The array with one axis per label, the labels of each of its original axes, and an iterator
        over unused label numbers.
    """
    # The labels on each axis of the array.
    axes = {places[d]: term.out[d] for d in places}
    fresh = itertools.count(term.fresh(1).id)
    out: list[Labels] = []
    for axis, size in enumerate(array.shape):
        labels = axes.get(axis, ())
        repeats = size // math.prod(label.size for label in labels)
        # The groups of a convolution repeat the axis one after the other, so the repeats are the
        # most significant label.
        out.append((Label(next(fresh), repeats), *labels) if repeats != 1 else labels)
    flat = [label.size for labels in out for label in labels]
    return array.reshape(flat), out, fresh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """The block-diagonal matrix of one weight.

    Attributes:
        term: its first factor is the matrix. The last two axes of that are row and column, which no
            axis of the weight shows; the others are those that the blocks vary along.
        label: the label of the weight's entries within a block. No factor owns it, so anything that
            cuts the entries of a block replaces it, which `moved_to` detects.
    """

    term: Term
    label: Label = dataclasses.field(metadata={"static": True})

    @property
    def axis(self) -> int:
        """The axis of the weight that is multiplied."""
        return next(d for d, labels in enumerate(self.term.out) if self.label in labels)

    @property
    def varying(self) -> list[int]:
        """The weight's axes that an operand needs: the multiplied one and those of blocks."""
        return [
            d
            for d, labels in enumerate(self.term.out)
            if any(label == self.label or self.term.owners(label) for label in labels)
        ]

    @property
    def is_owned(self) -> bool:
        """Whether the matrix varies along all that is left of the weight."""
        return all(
            label == self.label or label.size == 1 or label.is_index or self.term.owners(label)
            for label in self.term.shown
        )

    def moved_to(self, term: Term) -> "Turn":
        """Returns the same matrix with its term moved.

        Raises:
            Inexpressible: if the move cuts a block.
        """
        if not any(self.label in labels for labels in term.out):
            raise Inexpressible("reads a part of a block that an adapter multiplies as a whole")
        return dataclasses.replace(self, term=term)

    def factors(self, *, by_rows: bool, other: Label) -> list[_contract.Operand]:
        """Returns the matrix as operands that replace `label` by `other`.

        With `by_rows`, `label` is contracted with the rows of the matrix, as for the operand of a
        product. The weight and the result are contracted with its columns.
        """
        (matrix, *more), ((*blocks, row, column), *rest) = self.term.factors, self.term.labels
        # R[row, column]: x · R meets rows, R · W and R · result meet columns.
        names = {row: self.label, column: other} if by_rows else {row: other, column: self.label}
        return [(matrix, (*blocks, names[row], names[column])), *zip(more, rest, strict=True)]

    def applied_to(
        self, array: jax.Array, places: Mapping[int, int], *, by_rows: bool = False, **keywords: Any
    ) -> jax.Array:
        """Returns an array multiplied by the matrix.

        Args:
            array: the weight, its operand, or the result.
            places: maps axes of the weight to axes of the array, which may repeat one, as the
                groups of a convolution do.
            by_rows: as in `factors`.
            **keywords: passed to `contract`.
        """
        met, out, fresh = arranged(self.term, array, places)
        other = Label(next(fresh), self.label.size)
        flat = tuple(label for labels in out for label in labels)
        # array + array · (R − 1): the matrix is stored without its identity.
        operands = [(met, flat), *self.factors(by_rows=by_rows, other=other)]
        arrays, labels = zip(*operands, strict=True)
        # The result has `other` where the array had `label`.
        turned = tuple(
            tuple(other if label == self.label else label for label in axis) for axis in out
        )
        term = Term(arrays, labels, turned)
        dtype = _contract.product_dtype(array.dtype)
        return term.added_to(array, dtype, meets=0, **keywords)

    def inverse(self) -> "Turn":
        """Returns the inverse matrix as a turn."""
        matrix, *more = self.term.factors
        around = tuple(range(matrix.ndim - 2))
        identity = jnp.expand_dims(jnp.eye(self.label.size, dtype=matrix.dtype), around)
        # (1 + M)⁻¹ = 1 + inverse, [*blocks, n, n]
        inverse = jnp.linalg.inv(identity + matrix) - identity
        term = dataclasses.replace(self.term, factors=(inverse, *more))
        return dataclasses.replace(self, term=term)

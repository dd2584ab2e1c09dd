"""Terms of two weights that meet: common labels, and the term of their product.

    Σ_i W[i, o] V[i, p]

Every pair of terms gives one term, whose einsum sums over the labels that the result lacks.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax

from ._terms import Inexpressible, Label, Labels, Term

# The limits of a weight that is made of others. Each term costs products wherever the weight is
# used, a sum or product of weights has the terms of both, and a chain of these doubles them at
# every step.
MOST_TERMS = 16
MOST_FACTORS = 16


def check_size(terms: int, factors: int = 0) -> None:
    """Raises `Inexpressible` for a weight of too many terms, or of terms with too many factors."""
    if terms > MOST_TERMS:
        raise Inexpressible(f"would have {terms} low-rank terms, more than {MOST_TERMS}")
    if factors > MOST_FACTORS:
        raise Inexpressible(f"would have a term of {factors} factors, more than {MOST_FACTORS}")


def operand(array: Any) -> Term:
    """Returns an ordinary array as a term of one factor; a quantized base is decoded."""
    array = array if isinstance(array, jax.Array) else getattr(array, "array", lambda: array)()
    labels = tuple(Label(d, size) for d, size in enumerate(array.shape))
    return Term((array,), (labels,), tuple((label,) for label in labels))


def relabeled(left: Term, right: Term) -> Term:
    """Returns `right` with labels that `left` does not use."""
    # All labels of `right` are renumbered to come after the last one of `left`.
    offset = left.fresh(0).id
    used = {*right.shown, *itertools.chain(*right.labels)}
    return right.rename({label: (label._replace(id=label.id + offset),) for label in used})


def align(left: Term, right: Term, axes: Iterable[tuple[int, int]]) -> tuple[Term, Term]:
    """Gives pairs of axes, one of `left` and one of `right`, the same labels.

    Labels of a pair are split until their sizes agree. Then `right` takes those of `left`, or
    `left` those of `right` if they run over the entries of an index array.
    """
    for l_axis, r_axis in axes:
        i = 0
        while i < len(left.out[l_axis]) or i < len(right.out[r_axis]):
            if i >= len(left.out[l_axis]) or i >= len(right.out[r_axis]):
                # The other axis has run out of labels, so what is left has size one: show a label
                # without an owner on it.
                if i < len(left.out[l_axis]):
                    right = _show(right, r_axis, left.out[l_axis][i].size, other=left)
                else:
                    left = _show(left, l_axis, right.out[r_axis][i].size, other=right)
                continue
            # The most significant labels that are not paired yet.
            mine, theirs = left.out[l_axis][i], right.out[r_axis][i]
            if mine.size != theirs.size:
                if mine.size % theirs.size == 0:
                    # 6 with 2: the 6 becomes (2, 3), and in the next round the two 2s are a pair.
                    left, right = _split_with_new_labels(left, mine, theirs.size, right)
                elif theirs.size % mine.size == 0:
                    right, left = _split_with_new_labels(right, theirs, mine.size, left)
                else:
                    raise Inexpressible
            elif theirs.is_index:
                left, i = left.rename({mine: (theirs,)}), i + 1
            else:
                right, i = right.rename({theirs: (mine,)}), i + 1
    return left, right


def _show(term: Term, axis: int, size: int, *, other: Term) -> Term:
    assert size == 1, (term.out, other.out)
    new = Label(max(term.fresh(0).id, other.fresh(0).id), size)
    out = tuple((*labels, new) if d == axis else labels for d, labels in enumerate(term.out))
    return dataclasses.replace(term, out=out)


def _split_with_new_labels(term: Term, label: Label, size: int, other: Term) -> tuple[Term, Term]:
    """Splits a label of `term` into labels that `other` does not use."""
    term, (high, low) = term.split(label, size)
    start = max(term.fresh(0).id, other.fresh(0).id)
    names = {high: (high._replace(id=start),), low: (low._replace(id=start + 1),)}
    return term.rename(names), other


def product(left: Term, right: Term, out: tuple[Labels, ...]) -> Term:
    """Returns the einsum of two aligned terms that shows `out` and sums over all other labels."""
    term = Term(
        (*left.factors, *right.factors),
        (*left.labels, *right.labels),
        out,
        (*left.sources, *right.sources),
    )
    shown = set(term.shown)
    lost = {label for label in (*left.shown, *right.shown) if label not in shown}
    # Along a label without an owner both sides are constant: the sum is one entry times its size.
    repeats = math.prod(label.size for label in lost if not term.owners(label))
    return term.scale(repeats) if repeats != 1 else term


def entrywise(left: Term, right: Term) -> Term:
    """Returns the term of the entrywise product of two weights of one shape."""
    axes = [(d, d) for d in range(len(left.out))]
    left, right = align(left, relabeled(left, right), axes)
    return product(left, right, left.out)

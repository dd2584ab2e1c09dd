"""Products of a weight with what meets it: `dot_general` and `ragged_dot_general`.

    x · (W + Σ terms)  =  x · W  +  Σ einsum(x, factors of the term)

`x · W` is the original equation. For a term, the axes that the equation contracts or batches
get common labels on both sides, and one einsum over x and the factors follows; `_contract`
chooses its order, and never multiplies the factors of one weight into the weight's shape.

A weight times a weight is a weight again: `W₁` beside the factors of `W₂` is one more factor.

Sharp edges:

* A label of the contracted axis that no factor owns sums x over that axis.
* A batched axis may be owned by some factors only; the others serve every entry of the batch.
* Of the two halves of a term beside `ragged_dot`, at least one owns the expert axis, so that rows
  beyond the last group come out as in the plain model.
"""

import jax

from .._contract import contract, product_dtype
from .._registry import defrule
from .._terms import FactoredArray, Inexpressible, Term, align, apart, operand, product


def _dot(left: Term, right: Term, dimension_numbers) -> Term:
    """The term of `dot_general(left, right)`."""
    (l_sum, r_sum), (l_batch, r_batch) = dimension_numbers
    pairs = (*zip(l_sum, r_sum, strict=True), *zip(l_batch, r_batch, strict=True))
    left, right = align(left, apart(left, right), pairs)
    l_used, r_used = {*l_sum, *l_batch}, {*r_sum, *r_batch}
    out = (
        *(left.out[d] for d in l_batch),
        *(axis for d, axis in enumerate(left.out) if d not in l_used),
        *(axis for d, axis in enumerate(right.out) if d not in r_used),
    )
    return product(left, right, out)


@defrule("dot_general")
def _dot_general(
    eqn, left, right, *, dimension_numbers, precision, preferred_element_type, out_sharding
):
    l_base, l_terms = _parts(left)
    r_base, r_terms = _parts(right)
    if any(term.is_dense for term in (*l_terms, *r_terms)):
        raise Inexpressible("multiplies by a product of weights that is made entry by entry")
    for terms, summed, batch in zip((l_terms, r_terms), *dimension_numbers, strict=True):
        for term in terms:
            kept = [d for d in range(len(term.out)) if d not in (*summed, *batch)]
            eqn.use_axes(term, summed, kept)
    terms = [_dot(term, operand(r_base), dimension_numbers) for term in l_terms]
    terms += [_dot(operand(l_base), term, dimension_numbers) for term in r_terms]
    terms += [_dot(one, other, dimension_numbers) for one in l_terms for other in r_terms]
    base = eqn(l_base, r_base)
    if l_terms and r_terms:
        meets = [len(term.factors) for term in l_terms] + [0] * len(r_terms)
        meets += [None] * (len(l_terms) * len(r_terms))
        return eqn.settle(base, [forget_axes(term) for term in terms], meets=meets)
    dtype = product_dtype((r_base if l_terms else l_base).dtype, base.dtype)
    for term in terms:
        base = term.added_to(
            base,
            dtype,
            precision=precision,
            preferred_element_type=preferred_element_type,
            meets=len(term.factors) - 1 if l_terms else 0,
        )
    return base


def _parts(value) -> tuple[jax.Array, tuple[Term, ...]]:
    return (value.base, value.terms) if isinstance(value, FactoredArray) else (value, ())


def forget_axes(term: Term) -> Term:
    """The term of a product of weights, whose axes are no single parameter's axes."""
    labels = {label for labels in (*term.labels, *term.out) for label in labels}
    return term.rename({label: (label._replace(axis=None),) for label in labels})


@defrule("ragged_dot_general")
def _ragged_dot_general(
    eqn,
    left,
    right,
    group_sizes,
    *,
    ragged_dot_dimension_numbers,
    precision,
    preferred_element_type,
    group_offset,
    out_sharding=None,
):
    """Rows sorted by expert, each group of them against one slice of the weight."""
    numbers = ragged_dot_dimension_numbers
    (l_sum, r_sum), (l_batch, _) = numbers.dot_dimension_numbers
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if isinstance(left, FactoredArray) or isinstance(group_sizes, FactoredArray):
        return NotImplemented
    if group_offset is not None or l_batch or len(groups) != 1 or ragged[0] in l_sum:
        return NotImplemented
    deltas = []
    for term in right.terms:
        kept = [d for d in range(len(term.out)) if d not in (*r_sum, *groups)]
        fused, labels = term.fuse_all((*r_sum, *groups, *kept))
        inputs, group, outputs = labels[: len(r_sum)], labels[len(r_sum)], labels[-len(kept) :]
        first, second, bonds = fused.halves(inputs, outputs)
        eqn.use_axes(term, r_sum, kept)
        bonds = [label for label in bonds if label != group]
        deltas.append((first, second, inputs, bonds, outputs, group))
    free = [d for d in range(left.ndim) if d not in l_sum]
    base = eqn(left, right.base, group_sizes)
    dtype = product_dtype(left.dtype, base.dtype)
    for first, second, inputs, bonds, outputs, group in deltas:

        def multiply(x, summed, ragged_axis, half, inputs, outputs, preferred, group=group):
            owned = any(group in labels for _, labels in half)
            kernel_axes = ((group,) if owned else ()) + (*inputs, *outputs)
            kernel = contract(half, kernel_axes, dtype=dtype)
            dots = ((summed, list(range(owned, owned + len(inputs)))), ([], []))
            keywords = {"precision": precision, "preferred_element_type": preferred}
            if not owned:
                return jax.lax.dot_general(x, kernel, dots, **keywords)
            ragged_numbers = jax.lax.RaggedDotDimensionNumbers(dots, [ragged_axis], [0])
            return jax.lax.ragged_dot_general(x, kernel, group_sizes, ragged_numbers, **keywords)

        with jax.named_scope("lora"):
            middle = multiply(left.astype(dtype), l_sum, ragged[0], first, inputs, bonds, None)
            summed = list(range(len(free), middle.ndim))
            ragged_axis = free.index(ragged[0])
            delta = multiply(
                middle, summed, ragged_axis, second, bonds, outputs, preferred_element_type
            )
        base = base + delta.reshape(base.shape).astype(base.dtype)
    return base

"""Products with a weight: `dot_general` and `ragged_dot_general`.

    x · (W + Σ terms)  =  x · W  +  Σ einsum(x, factors of the term)

`x · W` is the original equation. For a term, the axes that the equation contracts or batches
get common labels on both sides, and a single einsum over x and the factors follows. `_contract`
chooses its order, and never multiplies the factors of a weight into an array of its shape.

A weight times a weight is a weight, with as many terms as both have together:

    (W + a b) · (V + c d)  =  W · V  +  a · (b · (V + c d))  +  (W · c) · d

The factors of a term that own the contracted axes absorb the other weight and become one narrow
factor, so the number of factors per term does not grow along a chain of weights.

Sharp edges:

* A label of the contracted axis that no factor owns sums x over that axis.
* A batched axis may be owned by some factors only; the others are shared by all of its entries.
* For `ragged_dot`, at least one of the two halves of a term owns the expert axis, so that rows
  beyond the last group have the same result as in the plain model.
"""

import dataclasses
from collections.abc import Sequence

import jax

from .._contract import product_dtype
from .._factored import FactoredArray, base_of, is_weight, terms_of
from .._paid import pay, with_dropout_on
from .._reading import reading
from .._registry import defrule
from .._term_products import align, check_size, operand, product, relabeled
from .._terms import Inexpressible, Term

# As in `jax.lax.dot_general`: the axes that are summed over, and the batched axes, of both sides.
Sequences = tuple[Sequence[int], Sequence[int]]
DimensionNumbers = tuple[Sequences, Sequences]


def _dot(left: Term, right: Term, dimension_numbers: DimensionNumbers) -> Term:
    """Returns the term of `dot_general(left, right)`."""
    (l_sum, r_sum), (l_batch, r_batch) = dimension_numbers
    pairs = (*zip(l_sum, r_sum, strict=True), *zip(l_batch, r_batch, strict=True))
    left, right = align(left, relabeled(left, right), pairs)
    # [*batch, *left's own, *right's own], the order in which `dot_general` has its result
    l_used, r_used = {*l_sum, *l_batch}, {*r_sum, *r_batch}
    out = (
        *(left.out[d] for d in l_batch),
        *(axis for d, axis in enumerate(left.out) if d not in l_used),
        *(axis for d, axis in enumerate(right.out) if d not in r_used),
    )
    return product(left, right, out)


def add_product(
    out: jax.Array, x: jax.Array, weight: FactoredArray, dimension_numbers: DimensionNumbers
) -> jax.Array:
    """Returns `out + Σ einsum(x, factors of the term)`: the result of a rule for a product.

    Args:
        out: the product with the base, `[*batch, *kept of x, *kept of the weight]`.
        x: the left operand of the product.
        weight: the weight, without gains, dropout or a pending norm.
        dimension_numbers: those of `jax.lax.dot_general(x, weight)`.

    Returns:
        The product with the adapted weight, in the dtype of `out`. No array as large as the weight
        is formed.

    Raises:
        Inexpressible: if a term is not a product of small factors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax.rules import FactoredArray, add_product
        >>> base, x = jnp.ones((3, 2)), jnp.ones((4, 3))
        >>> columns = (((1,), (0,)), ((), ()))  # axis 1 of x meets axis 0 of the weight
        >>> add_product(x @ base, x, FactoredArray(base, ()), columns).shape
        (4, 2)
    """
    if not weight.is_sum or any(term.is_dense for term in weight.terms):
        raise Inexpressible("multiplies by more than a base and terms of small factors")
    # Of the operands, not of the factors: float32 factors leave a bfloat16 model in bfloat16.
    dtype = product_dtype(x.dtype, weight.base.dtype, out=out.dtype)
    for term in weight.terms:
        out = _dot(operand(x), term, dimension_numbers).added_to(out, dtype, meets=0)
    return out


@defrule("dot_general", gains=True)
def _dot_general(
    eqn, left, right, *, dimension_numbers, precision, preferred_element_type, out_sharding
):
    l_base, l_terms = base_of(left), terms_of(left)
    r_base, r_terms = base_of(right), terms_of(right)
    if any(term.is_dense for term in (*l_terms, *r_terms)):
        raise Inexpressible("multiplies by a product of weights that is made entry by entry")
    eqn.use(left, "product")
    eqn.use(right, "product")
    dtype = eqn.product_dtype(l_base, r_base)
    keywords = {"precision": precision, "preferred_element_type": preferred_element_type}
    if is_weight(left) and is_weight(right):
        if not (left.is_sum and right.is_sum):
            raise Inexpressible("multiplies two weights, one of which has a gain or dropout")
        base = eqn(l_base, r_base)
        return _weight_of_weights(eqn, left, right, base, dimension_numbers, dtype, keywords)
    on_left = is_weight(left)
    weight, met = (left, right) if on_left else (right, left)
    weight, met, batched, finish = _paid(eqn, weight, met, dimension_numbers, on_left, precision)
    # x [*n, in] · W [in, out]: the original equation, with all of its options.
    base = eqn(weight.base, met) if on_left else eqn(met, weight.base)

    def with_terms(met):
        total = base
        for term in weight.terms:
            # x [*n, in] · a [in, rank] · b [rank, out] -> [*n, out]
            sides = (term, operand(met)) if on_left else (operand(met), term)
            term = _dot(*sides, dimension_numbers)
            # `_dot` puts the factors of the left side first, so x is the last or the first factor.
            meets = len(term.factors) - 1 if on_left else 0
            total = term.added_to(total, dtype, meets=meets, **keywords)
        return total

    return finish(with_dropout_on(met, weight, batched, with_terms))


def _paid(eqn, weight, met, dimension_numbers, is_left, precision):
    """Moves gains, turn and meter to the operand and the result; see `pay`.

    Returns:
        The weight without them, the operand, a map from batched axes of the weight to those of the
        operand, and a function to apply to the result.
    """
    if weight.is_sum:
        return weight, met, {}, lambda result: result
    summed, batch = (axes if is_left else axes[::-1] for axes in dimension_numbers)
    batched = dict(zip(*batch, strict=True))
    used = (*summed[0], *batch[0])
    kept = [d for d in range(len(weight.shape)) if d not in used]
    # The result is [*batch, *left's own, *right's own]: the axes that the weight keeps come
    # directly after the batch if it is on the left, and after those of the operand otherwise.
    first = len(batched) + (0 if is_left else met.ndim - len(used))
    shown = {d: k for k, d in enumerate(batch[0])} | {d: first + k for k, d in enumerate(kept)}
    # The axis of the operand that meets each axis of the weight.
    places = dict(zip(*summed, strict=True)) | batched
    if is_left and isinstance(precision, tuple):
        precision = precision[::-1]
    met = weight.metered(met, places)
    weight, met, pay_result = pay(weight, met, places, shown, precision=precision)
    return eqn.with_own_keys(weight), met, batched, pay_result


def _weight_of_weights(eqn, left, right, base, dimension_numbers, dtype, keywords):
    """Returns the weight that is the product of two weights."""
    summed, batch = dimension_numbers
    if not summed[0]:  # Nothing to absorb: every pair of terms is a term.
        # (W + Σ s) ⊗ (V + Σ t)  =  W ⊗ V  +  Σ s ⊗ V  +  Σ W ⊗ t  +  ΣΣ s ⊗ t
        check_size((len(left.terms) + 1) * (len(right.terms) + 1) - 1)
        terms = [_dot(term, operand(right.base), dimension_numbers) for term in left.terms]
        terms += [_dot(operand(left.base), term, dimension_numbers) for term in right.terms]
        terms += [_dot(x, y, dimension_numbers) for x in left.terms for y in right.terms]
        check_size(0, max(len(term.factors) for term in terms))
        # The position of the factor that is a whole base: last in s ⊗ V, first in W ⊗ t.
        meets = [len(term.factors) for term in left.terms] + [0] * len(right.terms)
        meets += [None] * (len(left.terms) * len(right.terms))
        return eqn.rows_or_weight(FactoredArray(base, tuple(terms)), meets=meets)
    # (W + Σ s) · (V + Σ t)  =  W · V  +  Σ s · (V + Σ t)  +  Σ W · t
    check_size(len(left.terms) + len(right.terms))
    terms = [_absorb(term, right, dimension_numbers, dtype, **keywords) for term in left.terms]
    # W · t is computed as t · W with the sides exchanged, and the axes are permuted back.
    exchanged = tuple(axes[::-1] for axes in dimension_numbers)
    if isinstance(keywords["precision"], tuple):
        keywords = keywords | {"precision": keywords["precision"][::-1]}
    shared, kept = len(batch[0]), len(right.shape) - len(summed[1])
    # [*shared, *right's own, *left's own] -> [*shared, *left's own, *right's own]
    order = [*range(shared), *range(kept, base.ndim), *range(shared, kept)]
    # Without its terms: s · t is already in the terms of the left side, above.
    alone = FactoredArray(left.base, ())
    for term in right.terms:
        absorbed = _absorb(term, alone, exchanged, dtype, **keywords)
        terms.append(absorbed.permute(order))
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))


def _absorb(term: Term, weight: FactoredArray, dimension_numbers, dtype, **keywords) -> Term:
    """Returns the term of `dot_general(term, weight)`: one factor absorbs the weight.

    (Σ_r a[i, r] b[r, o]) · W[o, p]  =  Σ_r a[i, r] (b · W)[r, p]
    """
    (summed, w_summed), (batch, w_batch) = dimension_numbers
    try:
        term, shared = term.fuse_all(batch)
    except Inexpressible:
        raise Inexpressible(
            "multiplies two adapted weights entry by entry along an axis that several factors own"
        ) from None
    # Labels of the contracted axes; the factors that own one of them meet the other weight.
    gone = [label for d in summed for label in term.out[d]]
    for label in gone:
        term = term.own(label)
    factors = list(zip(term.factors, term.labels, strict=True))
    meeting = [factor for factor in factors if not set(gone).isdisjoint(factor[1])]
    others = [factor for factor in factors if set(gone).isdisjoint(factor[1])]
    kept = [axis for d, axis in enumerate(term.out) if d not in (*summed, *batch)]
    needed = {label for labels in (*kept, *(labels for _, labels in others)) for label in labels}
    met = dict.fromkeys(label for _, labels in meeting for label in labels)
    inner_labels = tuple(label for label in met if label in needed and label not in shared)

    # meeting [*inner, *shared, *gone] · W [*shared, *gone, *new] -> [*shared, *inner, *new], the
    # order of `dot_general`: batch, then left, then right.
    first, second = len(inner_labels), len(inner_labels) + len(shared)
    axes = (*((label,) for label in (*inner_labels, *shared)), *(term.out[d] for d in summed))
    arrays, owned = zip(*meeting, strict=True)
    part = Term(arrays, owned, axes)
    numbers = (
        (range(second, len(axes)), w_summed),
        (range(first, second), w_batch),
    )

    def meeting_times(base: jax.Array, *arrays: jax.Array) -> jax.Array:
        left = dataclasses.replace(part, factors=arrays)
        return _dot(left, operand(base), numbers).array(dtype, meets=len(meeting), **keywords)

    # b [rank, gone] · W [gone, new] -> [rank, new], and the same of the terms of W.
    absorbed = reading(meeting_times, weight.base, *arrays)
    for other in weight.terms:
        meets = 0 if len(meeting) == 1 else None
        absorbed = _dot(part, other, numbers).added_to(absorbed, dtype, meets=meets, **keywords)
    new = tuple(term.fresh(size, skip=k) for k, size in enumerate(absorbed.shape[second:]))
    factors, labels = zip(*others, (absorbed, (*shared, *inner_labels, *new)), strict=True)
    out = (*((label,) for label in shared), *kept, *((label,) for label in new))
    return dataclasses.replace(term, factors=factors, labels=labels, out=out)

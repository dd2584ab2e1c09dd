"""Products of weights entry by entry, as in a norm.

    Σ (W + Δ)²  =  Σ W²  +  2 Σ W ⊙ Δ  +  Σ Δ ⊙ Δ

A term of the product has the base, or the factors of the other weight, as additional factors. The
sum that follows contracts them factor by factor. Any other use of the product materializes it.
"""

import jax.extend.core as jex

from .._factored import FactoredArray
from .._registry import defrule
from .._term_products import check_size, entrywise, operand
from .._terms import Inexpressible, Term

NOT_LINEAR = "is not linear in the weight"


def multiply(eqn, left: FactoredArray, right: FactoredArray) -> FactoredArray:
    """Returns the product of two weights of one shape."""
    _refuse_products(left, right)
    # (W + Σ s) ⊙ (V + Σ t)  =  W ⊙ V  +  Σ s ⊙ V  +  Σ W ⊙ t  +  ΣΣ s ⊙ t
    check_size((len(left.terms) + 1) * (len(right.terms) + 1) - 1)
    terms = [entrywise(term, operand(right.base)) for term in left.terms]
    terms += [entrywise(term, operand(left.base)) for term in right.terms]
    terms += [entrywise(one, other) for one in left.terms for other in right.terms]
    return FactoredArray(eqn(left.base, right.base), tuple(terms))


def square(base, weight: FactoredArray) -> FactoredArray:
    """Returns the square of a weight, given the square `base` of its base."""
    _refuse_products(weight)
    # n products with W, n squares and n (n − 1) / 2 pairs
    check_size(len(weight.terms) * (len(weight.terms) + 3) // 2)
    terms = [entrywise(term, operand(weight.base)).scale(2) for term in weight.terms]
    for k, term in enumerate(weight.terms):
        # (W + Σ t)² = W² + 2 Σ W t + Σ t² + 2 Σ_{j<k} t_j t_k
        terms.append(entrywise(term, term))
        terms += [entrywise(term, other).scale(2) for other in weight.terms[k + 1 :]]
    return FactoredArray(base, tuple(terms))


def gathered(term: Term, axes) -> Term:
    """Returns a term ready for a sum over `axes`: one factor other than the base owns each.

    Otherwise, multiplying the factors of one weight into its delta could be the cheapest order.
    """
    for label in [label for d in axes for label in term.out[d]]:
        dense = term.dense_factor
        owners = [k for k in term.owners(label) if k != dense]
        if dense is not None and len(owners) > 1:
            labels = dict.fromkeys(name for k in owners for name in term.labels[k])
            # Σ_i base[i, o] · a[i, r] · b[r, o] has one owner of i besides the base. With two, as
            # in a[i, r] · c[i, s], they become one factor [i, r, s]. But the two owners of a
            # block n, a[n, i, r] · b[n, r, o], would become the delta.
            if not labels.keys() >= set(term.labels[dense]):
                term = term.multiplied(owners, tuple(labels))
    return term


def _refuse_products(*weights: FactoredArray) -> None:
    if any(term.is_dense for weight in weights for term in weight.terms):
        raise Inexpressible("multiplies a product of weights by a weight, entry by entry")


@defrule("square")
def _square(eqn, weight):
    return square(eqn(weight.base), weight)


@defrule("integer_pow")
def _integer_pow(eqn, weight, *, y):
    if y != 2:
        raise Inexpressible(NOT_LINEAR)
    return square(eqn(weight.base), weight)


@defrule("pow")
def _pow(eqn, weight, exponent):
    """Handles `w ** 2.0`, whose exponent is a literal of the program."""
    if not isinstance(eqn.eqn.invars[1], jex.Literal) or exponent != 2:
        raise Inexpressible(NOT_LINEAR)
    return square(eqn(weight.base, exponent), weight)

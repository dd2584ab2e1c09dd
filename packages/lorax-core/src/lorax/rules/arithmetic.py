"""Arithmetic that is linear in a weight: sums, and products with arrays that are not weights."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp

from .._contract import product_dtype, wide_dtype
from .._factored import FactoredArray, base_of, is_weight
from .._registry import defreason, defrule
from .._term_products import align, check_size, operand, product, relabeled
from .._terms import Inexpressible, Label, Term
from . import norms


@defrule("reduce_sum")
def _reduce_sum(eqn, weight, *, axes, out_sharding=None):
    """Sums a weight; a product of weights is contracted here without being formed."""
    base = eqn(weight.base)
    of_product = any(term.is_dense for term in weight.terms) and base.size < weight.base.size
    # Σ (W ⊙ Δ) as in a norm: the sum contracts the factors with W, and no [in, out] is formed.
    terms = [norms.gathered(term, axes) if of_product else term for term in weight.terms]
    return eqn.rows_or_weight(
        FactoredArray(base, tuple(term.drop(axes) for term in terms)),
        meets=[term.dense_factor for term in terms],
        finished=of_product,
    )


@defrule("neg", gains=True)
def _neg(eqn, weight):
    weight = weight.resolved()
    # −(g ⊙ (W + Σ t))  =  g ⊙ (−W − Σ t): gains stay as they are.
    terms = tuple(term.scale(-1) for term in weight.terms)
    return weight.replace_terms(terms).replace_base(eqn(weight.base))


def _expand(term: Term, shape) -> Term:
    """Broadcasts axes of size one to `shape`, as element-wise primitives do."""
    return term if term.shape == shape else term.broadcast(shape, range(len(shape)))


def _sum(eqn, left, right, sign: int):
    shape = eqn.out_shape
    terms = [_expand(term, shape) for term in left.terms] if is_weight(left) else []
    if is_weight(right):
        moved = [_expand(term, shape) for term in right.terms]
        terms += [term.scale(-1) for term in moved] if sign < 0 else moved
        # W + W has the same term twice, and a loop of such sums would double the terms each time.
        # Only a weight that is added to itself can grow without bound.
        if is_weight(left) and not _sources(left).isdisjoint(_sources(right)):
            check_size(len(terms))
    return eqn.rows_or_weight(FactoredArray(eqn(base_of(left), base_of(right)), tuple(terms)))


def _sources(weight: FactoredArray) -> set[Hashable]:
    return {source for term in weight.terms for source in term.sources}


@defrule("add", "add_jaxvals")
def _add(eqn, left, right):
    return _sum(eqn, left, right, +1)


@defrule("sub")
def _sub(eqn, left, right):
    return _sum(eqn, left, right, -1)


def times(term: Term, array: jax.Array, shape, reason: str) -> Term:
    """Returns the term times an array that varies along some of the weight's axes only.

    Raises:
        Inexpressible: with `reason`, for an array that varies along all axes: no low rank is left.
    """
    if array.size == 1:
        # (a @ b) · c  =  (c a) @ b for a number c
        return _expand(term, shape).scale(array.reshape(()))
    varying = [axis for axis, size in enumerate(array.shape) if size != 1]
    term = _expand(term, shape)
    if len(varying) > 1 and len(varying) == sum(size != 1 for size in shape):
        raise Inexpressible(reason)
    # array [1, out] -> factor [out]: Δ ⊙ array is the einsum of a, b and one factor more.
    factor = relabeled(term, operand(array.reshape([array.shape[axis] for axis in varying])))
    term, factor = align(term, factor, [(axis, k) for k, axis in enumerate(varying)])
    return product(term, factor, term.out)


def _wide(weight, array) -> jax.Array:
    """Returns the array as factors use it: float32 or wider, complex if the array is."""
    array = jnp.asarray(array)
    return array.astype(wide_dtype(product_dtype(weight.base.dtype, array.dtype)))


def _scaled(eqn, weight, array, base, reason: str):
    """Scales the base and the terms by an array; gains multiply the result of that.

    An array along the axis that a turn multiplies becomes one more gain.
    """
    shape, weight = eqn.out_shape, weight.resolved()
    if weight.turn is not None and array.size != 1 and array.shape[weight.turn.axis] != 1:
        if shape != weight.shape:
            raise Inexpressible
        labels = tuple(Label(d, size) for d, size in enumerate(shape))
        # g ⊙ (turn · W): the array cannot move through the matrix, so it is a gain behind it.
        blank = Term((jnp.ones((), array.dtype),), ((),), tuple((x,) for x in labels),
                     weight.turn.term.sources)  # fmt: skip
        gain = times(blank, array, shape, reason)
        # The base is unchanged: the gain multiplies it when the weight is used.
        return eqn.rows_or_weight(dataclasses.replace(weight, gains=(*weight.gains, gain)))
    terms = [times(term, array, shape, reason) for term in weight.terms]
    check_size(0, max((len(term.factors) for term in terms), default=0))
    # (W + Σ t) ⊙ c  =  W ⊙ c  +  Σ (t ⊙ c)
    scaled = weight.moved(lambda piece: _expand(piece, shape)).replace_terms(terms)
    return eqn.rows_or_weight(scaled.replace_base(base()))


@defrule("mul", gains=True)
def _mul(eqn, left, right, *, out_dtype=None):
    """Multiplies a weight by an array; of two weights, the smaller is materialized."""
    if is_weight(left) and is_weight(right):
        if not (left.is_sum and right.is_sum):
            raise Inexpressible("multiplies two weights, one of which has a gain or dropout")
        if left is right:
            return norms.square(eqn(left.base, left.base), left)
        if left.shape == right.shape:
            return norms.multiply(eqn, left, right)
        smaller, reason = _smaller(left, right), "multiplies a larger weight by it"
        array = eqn.materialize(smaller, reason)
        left, right = (array, right) if smaller is left else (left, array)
    else:
        # As it was before it was broadcast, so that a gain [out] stays narrow.
        array = eqn.narrow(0 if is_weight(right) else 1)
    weight = left if is_weight(left) else right
    return _scaled(
        eqn, weight, _wide(weight, array), lambda: eqn(base_of(left), base_of(right)),
        "multiplies it by an array of the weight's shape",
    )  # fmt: skip


def _smaller(left, right):
    return left if left.base.size < right.base.size else right


@defrule("div", gains=True)
def _div(eqn, weight, divisor):
    if not is_weight(weight):
        raise Inexpressible("divides by it")
    if is_weight(divisor):
        array = divisor = eqn.materialize(divisor, "divides by it")
    else:
        array = eqn.narrow(1)
    return _scaled(
        eqn, weight, 1 / _wide(weight, array), lambda: eqn(weight.base, divisor),
        "divides it by an array of the weight's shape",
    )  # fmt: skip


defreason(
    norms.NOT_LINEAR,
    "abs", "sign", "floor", "ceil", "round", "max", "min", "clamp", "rem", "sqrt", "rsqrt",
    "cbrt", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "tan", "erf",
    "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "sort", "top_k", "cumprod",
    "cummax", "cummin", "cumlogsumexp", "scatter_max", "scatter_min", "pmax", "pmin",
)  # fmt: skip

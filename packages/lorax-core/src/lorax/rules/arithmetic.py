"""Arithmetic on weights that leaves them linear: sums, and products with what is not a weight."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from .._contract import product_dtype, wide_dtype
from .._registry import defrule, defstructural
from .._terms import FactoredArray, Inexpressible, Term, align, apart, check_size, operand, product

defstructural("reduce_sum", lambda term, *, axes, out_sharding=None: term.drop(axes))


@defrule("neg")
def _neg(eqn, weight):
    return FactoredArray(eqn(weight.base), tuple(term.scale(-1) for term in weight.terms))


def _expand(term: Term, shape) -> Term:
    """Lets axes of size one stand for the whole of `shape`, as element-wise primitives do."""
    return term if term.shape == shape else term.broadcast(shape, range(len(shape)))


def _sum(eqn, left, right, sign: int):
    shape = eqn.out_shape
    terms = [_expand(term, shape) for term in left.terms] if _is_weight(left) else []
    if _is_weight(right):
        moved = [_expand(term, shape) for term in right.terms]
        terms += [term.scale(-1) for term in moved] if sign < 0 else moved
        if _is_weight(left) and not _sources(left).isdisjoint(_sources(right)):
            check_size(len(terms))
    return eqn.settle(eqn(_base(left), _base(right)), terms)


def _sources(weight: FactoredArray) -> set[Hashable]:
    return {source for term in weight.terms for source in term.sources}


def _is_weight(value) -> bool:
    return isinstance(value, FactoredArray)


def _base(value):
    return value.base if isinstance(value, FactoredArray) else value


@defrule("add", "add_jaxvals")
def _add(eqn, left, right):
    return _sum(eqn, left, right, +1)


@defrule("sub")
def _sub(eqn, left, right):
    return _sum(eqn, left, right, -1)


def _times(term: Term, array: jax.Array, shape) -> Term:
    """The term times an array that varies along some of the weight's axes only."""
    if array.size == 1:
        return _expand(term, shape).scale(array.reshape(()))
    varying = [axis for axis, size in enumerate(array.shape) if size != 1]
    term = _expand(term, shape)
    if len(varying) > 1 and len(varying) == sum(size != 1 for size in shape):
        raise Inexpressible  # As many numbers as the weight has: no rank would be left.
    factor = apart(term, operand(array.reshape([array.shape[axis] for axis in varying])))
    term, factor = align(term, factor, [(axis, k) for k, axis in enumerate(varying)])
    return product(term, factor, term.out)


def _wide(weight, array) -> jax.Array:
    """The array as factors take it: exact beside a narrow weight, complex where it is."""
    array = jnp.asarray(array)
    return array.astype(wide_dtype(product_dtype(weight.base.dtype, array.dtype)))


def _scaled(eqn, weight, array, base):
    terms = [_times(term, array, eqn.out_shape) for term in weight.terms]
    check_size(0, max(len(term.factors) for term in terms))
    return eqn.settle(base(), terms)


@defrule("mul")
def _mul(eqn, left, right, *, out_dtype=None):
    if _is_weight(left) and _is_weight(right):
        return NotImplemented
    weight, array = (left, right) if _is_weight(left) else (right, left)
    return _scaled(eqn, weight, _wide(weight, array), lambda: eqn(_base(left), _base(right)))


@defrule("div")
def _div(eqn, weight, array):
    if not _is_weight(weight) or _is_weight(array):
        return NotImplemented
    return _scaled(eqn, weight, 1 / _wide(weight, array), lambda: eqn(weight.base, array))

"""Masked and updated weights: `select_n`, `scatter` and `dynamic_update_slice`.

    where(mask, W, V)  =  mask ⊙ W  +  (1 − mask) ⊙ V

The base goes through the original equation. A term is multiplied by a mask of the entries that are
kept. A mask that varies along some of the weight's axes only, such as a mask of whole rows, is one
more factor. The mask of an update is the same update applied to an array of ones, in which all axes
that the update covers are shrunk to one entry.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .._contract import wide_dtype
from .._factored import FactoredArray, base_of, is_weight, terms_of
from .._registry import defrule
from .._terms import Inexpressible, Label, Term
from .arithmetic import times
from .structural import pad_axis

_FULL = "gets an array mask of the weight's shape"
_PART = "overwrites a part that is not made of whole rows or columns"


@defrule("select_n")
def _select_n(eqn, which, *cases):
    if isinstance(which, FactoredArray):
        return NotImplemented
    base = eqn(which, *map(base_of, cases))
    which = eqn.narrow(0)
    dtype = wide_dtype(base.dtype)
    terms = []
    for k, case in enumerate(cases):
        # select_n(which, *cases)  =  Σ_k mask_k ⊙ case_k
        mask = (which == jnp.asarray(k, which.dtype)).astype(dtype)
        terms += [times(term, mask, eqn.out_shape, _FULL) for term in terms_of(case)]
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))


# Updates in place.


@defrule("dynamic_update_slice")
def _dynamic_update_slice(eqn, weight, update, *starts):
    if any(isinstance(start, FactoredArray) for start in starts):
        return NotImplemented
    base = eqn(base_of(weight), base_of(update), *starts)
    shape, window = weight.shape, update.shape
    # An update as long as an axis replaces all of it, whatever start is given.
    kept = [d for d, size in enumerate(shape) if size != window[d]]
    terms = []
    if terms_of(weight):
        # 1 where the weight is kept, 0 in the window. An axis that is replaced as a whole is shrunk
        # to one entry, so that the mask does not vary along it.
        ones = jnp.ones([size if d in kept else 1 for d, size in enumerate(shape)], base.dtype)
        zeros = jnp.zeros([size if d in kept else 1 for d, size in enumerate(window)], base.dtype)
        terms += _masked(weight, jax.lax.dynamic_update_slice(ones, zeros, starts))
    for term in terms_of(update):
        for d in kept:

            def write(room, factor, k, start=starts[d]):
                return jax.lax.dynamic_update_slice_in_dim(room, factor, start, k)

            # The term of the update, written into zeros of the weight's shape.
            term = _written(term, d, shape[d], write)
        terms.append(term)
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))


@defrule("scatter", "scatter_add", "scatter_sub", "scatter_mul")
def _scatter(
    eqn,
    weight,
    indices,
    updates,
    *,
    dimension_numbers,
    mode,
    indices_are_sorted,
    unique_indices,
    update_jaxpr,
    update_consts,
):
    """Additions leave the weight's terms unchanged; replacements and scales mask them."""
    name = eqn.eqn.primitive.name
    if name == "scatter-mul" and is_weight(updates):
        raise Inexpressible("multiplies by it")
    terms = list(terms_of(weight))
    if terms and name in ("scatter", "scatter-mul"):
        zero = jnp.zeros((1,) * len(updates.shape), base_of(updates).dtype)
        # `scatter` leaves 0 of the old entries, `scatter_mul` the factor that it multiplies them
        # by.
        narrow = zero if name == "scatter" else eqn.narrow(2)
        terms = _masked(weight, _mask(eqn, weight, indices, updates.shape, narrow))
    for term in terms_of(updates):
        term = term.scale(-1) if name == "scatter-sub" else term
        terms.append(_scattered(term, weight.shape, indices, dimension_numbers, mode))
    base = eqn(base_of(weight), indices, base_of(updates))
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))


def _masked(weight: FactoredArray, mask: jax.Array) -> list[Term]:
    mask = mask.astype(wide_dtype(mask.dtype))
    return [times(term, mask, weight.shape, _PART) for term in weight.terms]


def _mask(eqn, weight, indices, shape, narrow) -> jax.Array:
    """Returns the equation applied to ones; `narrow` has size one where updates are constant.

    An axis that every window covers and that no index moves along is shrunk to one entry.
    """
    numbers = eqn.eqn.params["dimension_numbers"]
    outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [d for d in range(len(weight.shape)) if d not in outside]
    room, update = list(weight.shape), list(shape)
    for d, k in zip(windows, numbers.update_window_dims, strict=True):
        # The window covers the whole axis, so the mask is constant along it.
        covered = room[d] == update[k] and d not in numbers.scatter_dims_to_operand_dims
        if covered and narrow.shape[k] == 1:
            room[d] = update[k] = 1
    ones = jnp.ones(room, weight.base.dtype)
    return eqn(ones, indices, jnp.broadcast_to(narrow, update))


def _scattered(term: Term, shape, indices, numbers, mode) -> Term:
    """Returns the term of one window, written into zeros of `shape` axis by axis."""
    if indices.ndim != 1 or numbers.operand_batching_dims:
        raise Inexpressible("writes parts of it to several places")
    # Axes that the window does not have: it has one entry along them.
    for d in sorted(numbers.inserted_window_dims):
        new: tuple[Label, ...] = (term.fresh(1),)
        term = dataclasses.replace(term, out=(*term.out[:d], new, *term.out[d:]))
    indexed = dict(zip(numbers.scatter_dims_to_operand_dims, range(len(indices)), strict=True))
    for d, size in enumerate(shape):
        if d not in indexed:
            # Without an index, the window starts at 0.
            term = pad_axis(term, d, 0, size - term.shape[d])
            continue

        def write(room, factor, k, column=indexed[d]):
            window = jax.lax.ScatterDimensionNumbers(tuple(range(factor.ndim)), (), (k,))
            at = indices[column : column + 1]
            return jax.lax.scatter(room, at, factor, window, mode=mode)

        term = _written(term, d, size, write)
    return term


def _written(term: Term, axis: int, size: int, write) -> Term:
    """Returns the term with an axis of `size`: zero, except for what `write` writes into it.

    `write(room, factor, axis)` writes a factor into zeros.
    """
    term, label = term.fuse(axis)

    def change(factor: jax.Array, k: int) -> jax.Array:
        # […, window, …] -> […, size, …]
        room = jnp.zeros((*factor.shape[:k], size, *factor.shape[k + 1 :]), factor.dtype)
        return write(room, factor, k)

    return term.own(label).along(label, change, size)[0]

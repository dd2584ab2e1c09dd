"""Linear maps along an axis, such as cumulative sums and Fourier transforms: applied to one factor.

    C (a @ b)  =  (C a) @ b

If several factors own the axis, they are multiplied first, where the product is no larger than one
of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._contract import product_dtype
from .._factored import FactoredArray
from .._registry import defrule, defstructural
from .._terms import Inexpressible, Label, Term


def _sole_owner(term: Term, axis: int) -> tuple[Term, Label, int]:
    """Returns a term in which one factor owns an axis, the label of the axis, and that factor."""
    try:
        term, label = term.fuse(axis)
        term = term.own(label)
        # C (a ⊙ c) is not (C a) ⊙ c: two owners are one factor first.
        if len(term.owners(label)) > 1:
            term = term.one_owner(label)
    except Inexpressible:
        raise Inexpressible("runs along an axis that several factors share") from None
    return term, label, term.owners(label)[0]


def _cumsum(term: Term, *, axis, reverse) -> Term:
    term, label, _ = _sole_owner(term, axis)
    change = lambda factor, k: jax.lax.cumsum(factor, k, reverse)  # noqa: E731
    return term.along(label, change, label.size)[0]


defstructural("cumsum", _cumsum, moves=False)


@defrule("fft")
def _fft(eqn, weight, *, fft_type, fft_lengths):
    """Transforms one axis after the other; a real transform is along the last one."""
    types = jax.lax.FftType
    first = len(weight.shape) - len(fft_lengths)
    # (axis, length) pairs: the transform is along the last axes.
    *others, last = enumerate(fft_lengths, first)
    dtype = weight.base.dtype
    along = {types.RFFT: types.FFT, types.IRFFT: types.IFFT}.get(fft_type, fft_type)
    terms = []
    for term in weight.terms:
        # The real transform is applied first, because later axes are complex, and its inverse last.
        if fft_type == types.RFFT:
            term = _transformed(term, *last, fft_type, lambda f: f.astype(dtype))
        for axis, length in others if along != fft_type else [*others, last]:
            term = _transformed(term, axis, length, along, _as_complex(dtype))
        if fft_type == types.IRFFT:
            term = _transformed(term, *last, fft_type, _as_complex(dtype))
        terms.append(term)
    return eqn.rows_or_weight(FactoredArray(eqn(weight.base), tuple(terms)))


def _as_complex(dtype) -> Callable[[jax.Array], jax.Array]:
    """Returns a cast of factors to the complex counterpart of a weight's dtype."""
    wide = product_dtype(dtype, jnp.complex64)
    return lambda factor: factor.astype(wide)


def _transformed(term: Term, axis: int, length: int, fft_type, cast) -> Term:
    term, label, owner = _sole_owner(term, axis)
    size = length
    if fft_type == jax.lax.FftType.RFFT:
        size = length // 2 + 1
    if fft_type == jax.lax.FftType.IRFFT:
        # The inverse real transform is linear over real numbers only, so all other factors must be
        # real.
        term = term.complex_in(owner)

    def change(factor: jax.Array, k: int) -> jax.Array:
        # […, length, …] -> […, length] -> […, size] -> […, size, …]
        moved = jnp.moveaxis(cast(factor), k, -1)
        return jnp.moveaxis(jax.lax.fft(moved, fft_type, (length,)), -1, k)

    return term.along(label, change, size)[0]

"""Complex weights: how they are made from real ones, and their real and imaginary parts.

    Re (a @ b)  =  Re a @ Re b  −  Im a @ Im b

Taking a part is linear over real numbers only. So all factors but one are made real first: their
two parts become one more label of size two.
"""

import dataclasses

import jax.numpy as jnp

from .._factored import FactoredArray, base_of
from .._registry import defrule
from .._terms import Inexpressible, Term


@defrule("complex")
def _complex(eqn, real, imag):
    parts = [base_of(real), base_of(imag)]
    base = eqn(*parts)
    terms = [*real.terms] if isinstance(real, FactoredArray) else []
    if isinstance(imag, FactoredArray):
        # complex(R + Σ s, I + Σ t)  =  complex(R, I)  +  Σ s  +  Σ i t
        terms += [term.scale(jnp.asarray(1j, base.dtype)) for term in imag.terms]
    return FactoredArray(base, tuple(terms))


@defrule("conj")
def _conj(eqn, weight, *, input_dtype):
    terms = [
        dataclasses.replace(term, factors=tuple(map(jnp.conj, term.factors)))
        for term in weight.terms
    ]
    return FactoredArray(eqn(weight.base), tuple(terms))


def _is_complex(term: Term) -> bool:
    return any(map(jnp.iscomplexobj, term.factors))


def _part(term: Term, part) -> Term:
    """Returns the real or the imaginary part of a term, taken in its smallest complex factor."""
    if term.is_dense:
        raise Inexpressible("takes one part of a product of weights that is made entry by entry")
    wide = [k for k, factor in enumerate(term.factors) if jnp.iscomplexobj(factor)]
    # The factor that stays complex doubles along the part label, so the smallest one does.
    k = min(wide, key=lambda k: term.factors[k].size)
    term = term.complex_in(k)
    factors = (*term.factors[:k], part(term.factors[k]), *term.factors[k + 1 :])
    return dataclasses.replace(term, factors=factors)


@defrule("real")
def _real(eqn, weight):
    terms = [_part(term, jnp.real) if _is_complex(term) else term for term in weight.terms]
    return eqn.rows_or_weight(FactoredArray(eqn(weight.base), tuple(terms)))


@defrule("imag")
def _imag(eqn, weight):
    # The imaginary part of a real term is zero, so it is dropped.
    terms = [_part(term, jnp.imag) for term in weight.terms if _is_complex(term)]
    return eqn.rows_or_weight(FactoredArray(eqn(weight.base), tuple(terms)))

"""Collectives on weights that the user has split, inside `shard_map`.

On device j, a term is a_j @ b_j. Gathering the factors that differ between devices gives them one
more label, the device. Each collective shows that label or sums over it:

    all_gather      shows it                        [j, in, out]
    psum            sums over it                    Σ_j a_j @ b_j
    reduce_scatter  sums over it, and keeps this device's part of an axis
    all_to_all      shows it, and keeps this device's part of an axis

Factors that are the same on all devices are not gathered. Their types show which these are, except
under `check_vma=False` and under a named `vmap`, where all factors are gathered.

For bases that are stored as codes, see `_coded_collectives`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import _compat
from .._coded import is_coded
from .._factored import FactoredArray
from .._registry import defrule
from .._terms import Label, Term
from ._coded_collectives import exchanged, moved_base, sent, summed_base


def _names(axis_name) -> tuple[Any, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _size(names, groups) -> int:
    return len(groups[0]) if groups is not None else math.prod(map(jax.lax.axis_size, names))


def _position(names, groups) -> jax.Array:
    """Returns the position of this device in its group, or along `names` without groups."""
    index = jax.lax.axis_index(names)
    if groups is None:
        return index
    # Every device is in exactly one group.
    places = {device: place for group in groups for place, device in enumerate(group)}
    return jnp.asarray([places[device] for device in sorted(places)], index.dtype)[index]


def _varying(weight: FactoredArray, term: Term, names) -> list[int]:
    """Returns the positions of the factors that may differ between the devices along `names`."""
    base = weight.base.first if is_coded(weight.base) else weight.base
    if not _compat.varying_axes(base).issuperset(names):
        return list(range(len(term.factors)))  # Nothing is known.
    return [
        k
        for k, factor in enumerate(term.factors)
        if not _compat.varying_axes(factor).isdisjoint(names)
    ]


def _with_devices(term: Term, varying, size: int, gather) -> tuple[Term, Label]:
    """Gathers the factors that vary along one more label, the device; returns it as well."""
    device = term.fresh(size)
    factors, labels = list(term.factors), list(term.labels)
    for k in varying:
        # factor [*labels] -> [device, *labels]; one that is equal on all devices is not gathered.
        factors[k], labels[k] = gather(factors[k]), (device, *labels[k])
    return dataclasses.replace(term, factors=tuple(factors), labels=tuple(labels)), device


def _gathered(weight, term, names, groups) -> tuple[Term, Label]:
    gather = lambda factor: jax.lax.all_gather(factor, names, axis_index_groups=groups)  # noqa: E731
    return _with_devices(term, _varying(weight, term, names), _size(names, groups), gather)


def _show(term: Term, device: Label, axis: int, tiled: bool) -> Term:
    """Shows the device label as an axis of its own or, if tiled, in front of an axis."""
    out = list(term.out)
    if tiled:
        # [devices · size]: device by device, so its label is the most significant one.
        out[axis] = (device, *out[axis])
    else:
        out.insert(axis, (device,))
    return dataclasses.replace(term, out=tuple(out))


def _own_part(term: Term, axis: int, names, groups, tiled: bool) -> Term:
    """Keeps this device's part of an axis; if not tiled, that is one entry without an axis."""
    term, (label,) = term.fuse_all([axis])
    part = label.size // _size(names, groups)
    # Part d of an axis [devices · part] begins at d · part.
    start = _position(names, groups) * part

    def change(factor: jax.Array, k: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(factor, start, part, k)

    term, _ = term.along(label, change, part)
    return term if tiled else term.drop([axis])


@defrule("all_gather", "all_gather_invariant", gains=True)
def _all_gather(
    eqn, weight, *, all_gather_dimension, axis_name, axis_index_groups=None, axis_size, tiled
):
    def gather(factor):
        return eqn.with_params(all_gather_dimension=0, tiled=False)(factor)

    names = _names(axis_name)

    def gathered(term: Term) -> Term:
        # Only these are gathered; the device label is without an owner if there are none.
        varying = _varying(weight, term, names)
        term, device = _with_devices(term, varying, axis_size, gather)
        return _show(term, device, all_gather_dimension, tiled)

    base = moved_base(eqn, weight, names, gathered)
    return eqn.rows_or_weight(weight.moved(gathered).replace_base(base))


@defrule("psum", "psum_invariant")
def _psum(eqn, *operands, axes, axis_index_groups=None):
    """Sums a single varying factor; with several, the devices become part of the rank."""
    # Integers are positional axes, over which this device alone sums.
    if any(isinstance(axis, int) for axis in axes):
        return NotImplemented
    size = _size(axes, axis_index_groups)
    bases = eqn(*(summed_base(eqn, operand) for operand in operands))
    several = eqn.eqn.primitive.multiple_results  # JAX < 0.10
    alone = lambda factor: eqn(factor)[0] if several else eqn(factor)  # noqa: E731

    def gather(factor):
        """Returns the entries of all devices as a sum, whose type shows that it is equal on all."""
        # [device, *factor]: this device's entry in its place, zeros elsewhere, and then the sum.
        mine = jnp.arange(size) == _position(axes, axis_index_groups)
        return alone(jnp.where(mine.reshape(size, *(1,) * factor.ndim), factor[None], 0))

    def summed(weight, term):
        varying = _varying(weight, term, axes)
        if not varying:
            # Equal on all devices: the sum is their number times one.
            return term.scale(size)
        if len(varying) == 1:
            (k,) = varying
            factors = (*term.factors[:k], alone(term.factors[k]), *term.factors[k + 1 :])
            return dataclasses.replace(term, factors=factors)
        # Σ_d a_d @ b_d  =  [a_1 … a_n] @ [b_1; …; b_n]: the devices are a label that no axis shows.
        return _with_devices(term, varying, size, gather)[0]

    outs = [
        eqn.rows_or_weight(FactoredArray(base, tuple(summed(weight, t) for t in weight.terms)))
        if isinstance(weight, FactoredArray)
        else base
        for weight, base in zip(operands, bases if several else [bases], strict=True)
    ]
    return outs if several else outs[0]


@defrule("reduce_scatter")
def _reduce_scatter(
    eqn, weight, *, scatter_dimension, axis_name, axis_index_groups, axis_size, tiled
):
    names = _names(axis_name)
    terms = []
    for term in weight.terms:
        summed, device = _gathered(weight, term, names, axis_index_groups)
        # No factor varies over the devices: each of them adds the same.
        if not summed.owners(device):
            summed = summed.scale(axis_size)
        terms.append(_own_part(summed, scatter_dimension, names, axis_index_groups, tiled))
    return eqn.rows_or_weight(FactoredArray(eqn(summed_base(eqn, weight)), tuple(terms)))


@defrule("all_to_all")
def _all_to_all(eqn, weight, *, split_axis, concat_axis, axis_name, axis_index_groups, tiled):
    """The equation of an exchange that is not tiled has axes of one entry where it needs them."""
    names = _names(axis_name)
    terms = []
    for term in weight.terms:
        term, device = _gathered(weight, term, names, axis_index_groups)
        term = _own_part(term, split_axis, names, axis_index_groups, True)
        terms.append(_show(term, device, concat_axis, True))

    def exchange(term: Term) -> Term:
        size = _size(names, axis_index_groups)
        term, device = exchanged(term, split_axis, size, axis_name, axis_index_groups)
        return _show(term, device, concat_axis, True)

    base = moved_base(eqn, weight, names, exchange)
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))


@defrule("ppermute")
def _ppermute(eqn, weight, *, axis_name, perm):
    """Sends what varies, or the smallest factor: one must be zero where nothing arrives."""
    terms = []
    for term in weight.terms:
        smallest = min(range(len(term.factors)), key=lambda k: term.factors[k].size)
        # Factors that are equal on all devices need not be sent.
        going = _varying(weight, term, _names(axis_name)) or [smallest]
        factors = tuple(
            jax.lax.ppermute(factor, axis_name, perm) if k in going else factor
            for k, factor in enumerate(term.factors)
        )
        terms.append(dataclasses.replace(term, factors=factors))

    names = _names(axis_name)
    size = _size(names, None)
    send = lambda term: sent(term, axis_name, perm, size)  # noqa: E731
    base = moved_base(eqn, weight, names, send, makes_zeros=len(perm) < size)
    return eqn.rows_or_weight(FactoredArray(base, tuple(terms)))

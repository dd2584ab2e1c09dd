"""Primitives that move, merge, repeat or cut the axes of a weight, or change how it is stored.

Factors are left unchanged, or cut along an axis that they own.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .._coded import array_spec, is_coded
from .._factored import FactoredArray, base_of
from .._registry import defdirect, defmove, defrule, defstructural
from .._sharding import factor_sharding
from .._terms import Inexpressible, Label, Term

# How a weight is stored.

defdirect("copy")
defdirect("reduce_precision", parameters=("exponent_bits", "mantissa_bits"))
defdirect("name", parameters=("name",))
defdirect("layout_constraint", parameters=("layout",))


@defrule("pvary", gains=True)
def _pvary(eqn, *weights, axes, axis_index_groups=None):
    """Varies only the base: factors become varying when they meet something that is."""
    if not eqn.eqn.primitive.multiple_results:
        (weight,) = weights
        # Codes and scales vary each by itself.
        vary = jax.tree.map(eqn, weight.base) if is_coded(weight.base) else eqn(weight.base)
        return weight.replace_base(vary)
    bases = eqn(*map(base_of, weights))  # JAX < 0.10 varies several arrays at once.
    return [
        weight.replace_base(base) if isinstance(weight, FactoredArray) else base
        for weight, base in zip(weights, bases, strict=True)
    ]


@defrule("convert_element_type", gains=True)
def _convert_element_type(eqn, weight, *, new_dtype, weak_type, sharding):
    """Casts the base between inexact types; casts that are not linear materialize it."""
    old = weight.base.dtype
    loses_imaginary = jnp.issubdtype(old, jnp.complexfloating) and not jnp.issubdtype(
        new_dtype, jnp.complexfloating
    )
    # To integers, or from complex to real: the cast of a sum is not the sum of the casts.
    if not jnp.issubdtype(new_dtype, jnp.inexact) or loses_imaginary:
        return NotImplemented
    return eqn.rows_or_weight(weight.replace_base(eqn(weight.base)))


@defrule("stop_gradient", gains=True)
def _stop_gradient(eqn, weight):
    # The user stops the gradient of the adapted weight, which includes that of its factors.
    return jax.tree.map(jax.lax.stop_gradient, weight).replace_base(eqn(weight.base))


@defrule("optimization_barrier", gains=True)
def _optimization_barrier(eqn, *operands):
    """Puts one barrier around the bases and the factors together."""
    return jax.lax.optimization_barrier(list(operands))


def _placed(eqn, weight, sharding, place):
    """Places factors like the base, axis by axis; codes and scales are placed the same way."""

    def placed_codes(term: Term) -> Term:
        if not isinstance(sharding, NamedSharding):
            return placed(term)
        # Codes and scales have blocks as axes: a partition has to divide whole blocks.
        specs = [array_spec(sharding.mesh, sharding.spec, term.out, x) for x in term.labels]
        factors = tuple(
            place(factor, NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind))
            for factor, spec in zip(term.factors, specs, strict=True)
        )
        return dataclasses.replace(term, factors=factors)

    def placed(term: Term) -> Term:
        factors = tuple(
            place(factor, factor_sharding(sharding, term.out, labels))
            for factor, labels in zip(term.factors, term.labels, strict=True)
        )
        return dataclasses.replace(term, factors=factors)

    base = weight.base
    # Codes and scales are placed by the partition of their blocks.
    base = base.changed(placed_codes) if is_coded(base) else eqn(base)
    return weight.moved(placed).replace_base(base)


@defrule("sharding_constraint", gains=True)
def _sharding_constraint(eqn, weight, *, sharding, layout, context_mesh, unconstrained_dims):
    return _placed(eqn, weight, sharding, jax.lax.with_sharding_constraint)


@defrule("reshard", gains=True)
def _reshard(eqn, weight, *, dst_sharding, concrete_mesh=None):
    return _placed(eqn, weight, dst_sharding, jax.sharding.reshard)


@defrule("device_put", gains=True)
def _device_put(eqn, *weights, devices, srcs, copy_semantics):
    placed = []
    coded = [is_coded(base_of(weight)) for weight in weights]
    # One equation places several values at once, and bases must all be arrays or all codes.
    if any(coded) and not all(coded):
        raise Inexpressible("joins a quantized base with other arrays")
    outs = weights if all(coded) else eqn(*map(base_of, weights))
    for weight, base, device in zip(weights, outs, devices, strict=True):
        if not isinstance(weight, FactoredArray):
            placed.append(base)
            continue
        move = lambda factor, sharding: jax.device_put(factor, sharding)  # noqa: E731
        placed.append(_placed(lambda _, base=base: base, weight, device, move))
    return placed


# Axes that move.

defstructural("transpose", lambda term, *, permutation: term.permute(permutation))
defstructural("squeeze", lambda term, *, dimensions: term.drop(dimensions))


def _reshape(term: Term, *, new_sizes, dimensions, sharding) -> Term:
    order = range(len(term.out)) if dimensions is None else dimensions
    # `dimensions`, if given, is a permutation that is applied before the reshape.
    return term.permute(order).reshape(new_sizes)


def _broadcast(term: Term, *shape_parts, shape, broadcast_dimensions, sharding) -> Term:
    if shape_parts:
        raise Inexpressible("has a shape that is computed")
    return term.broadcast(shape, broadcast_dimensions)


defstructural("reshape", _reshape)
defstructural("broadcast_in_dim", _broadcast)


def _flip(term: Term, *, dimensions) -> Term:
    for axis in dimensions:
        for label in term.out[axis]:
            # Index (i, j) of [m, n] is i · n + j, so reversing both reverses the row-major axis.
            term, _ = term.along(label, lambda f, k: jnp.flip(f, k), label.size)
    return term


defstructural("rev", _flip)


def _tile(term: Term, *, reps) -> Term:
    """Adds a label without an owner in front of each repeated axis."""
    # [a, b] tiled twice is [a, b, a, b]: the repeat is the most significant label.
    repeats = [term.fresh(n, skip=k) for k, n in enumerate(reps)]
    out = tuple(
        (repeat, *axis) if repeat.size != 1 else axis
        for repeat, axis in zip(repeats, term.out, strict=True)
    )
    return dataclasses.replace(term, out=out)


defstructural("tile", _tile)


# Axes that are cut or padded.


def cut(term: Term, axis: int, start: int, limit: int, stride: int = 1) -> Term:
    """Returns the term of `weight[start:limit:stride]` along one axis."""
    size = term.shape[axis]
    if (start, limit, stride) == (0, size, 1):
        return term
    if stride == 1:
        term, label, unit = term.leading(axis, (start, limit))
    else:
        (term, label), unit = term.fuse(axis), 1
    # A leading label of 6 steps of 3 entries each: cutting the axis at 9 cuts the label at 3.
    start, limit = start // unit, limit // unit
    return term.along(
        label,
        lambda factor, k: jax.lax.slice_in_dim(factor, start, limit, stride, k),
        -(-(limit - start) // stride),
    )[0]


def _slice(term: Term, *, start_indices, limit_indices, strides) -> Term:
    strides = strides or (1,) * len(start_indices)
    for axis, window in enumerate(zip(start_indices, limit_indices, strides, strict=True)):
        term = cut(term, axis, *window)
    return term


defstructural("slice", _slice)


def _bounds(sizes):
    # sizes (2, 3) -> bounds (0, 2), (2, 5)
    return list(itertools.pairwise(itertools.accumulate((int(n) for n in sizes), initial=0)))


def _pieces(eqn, weight, changes):
    """Returns several weights from one, each by a change of its own."""
    parts = [weight.moved(change) for change in changes]
    # The equation splits the base once, and each term is cut for each of the pieces.
    bases = eqn(weight.base)
    return [
        eqn.rows_or_weight(part.replace_base(base)) for part, base in zip(parts, bases, strict=True)
    ]


def _splits(*, sizes, axis):
    return [lambda term, b=bound: cut(term, axis, *b) for bound in _bounds(sizes)]


def _unstacks(size, *, axis):
    return [lambda term, i=i: cut(term, axis, i, i + 1).drop((axis,)) for i in range(size)]


@defrule("split", gains=True)
def _split(eqn, weight, *, sizes, axis):
    return _pieces(eqn, weight, _splits(sizes=sizes, axis=axis))


@defrule("unstack", gains=True)
def _unstack(eqn, weight, *, axis):
    return _pieces(eqn, weight, _unstacks(weight.shape[axis], axis=axis))


defmove("split")(lambda term, **params: [change(term) for change in _splits(**params)])
defmove("unstack")(
    lambda term, *, axis: [change(term) for change in _unstacks(term.shape[axis], axis=axis)]
)


def pad_axis(term: Term, axis: int, low: int, high: int, interior: int = 0) -> Term:
    """Returns the term of the weight padded along one axis, with zeros in the term."""
    if (low, high, interior) == (0, 0, 0):
        return term
    if interior == 0:
        term, label, unit = term.leading(axis, (low, high))
    else:
        (term, label), unit = term.fuse(axis), 1
    # With zeros around it, the term is no longer constant along the axis: a factor must own it.
    term = term.own(label)
    # Padding is counted in steps of the leading label.
    low, high = low // unit, high // unit

    def change(factor: jax.Array, k: int) -> jax.Array:
        config = [(low, high, interior) if d == k else (0, 0, 0) for d in range(factor.ndim)]
        return jax.lax.pad(factor, jnp.zeros((), factor.dtype), config)

    # [low zeros, entries with `interior` zeros between them, high zeros]
    size = label.size + low + high + interior * max(label.size - 1, 0)
    return term.along(label, change, size)[0]


@defrule("pad")
def _pad(eqn, weight, value, *, padding_config):
    if not isinstance(weight, FactoredArray) or isinstance(value, FactoredArray):
        return NotImplemented
    terms = []
    for term in weight.terms:
        # The base is padded with `value`; the terms are padded with zeros.
        for axis, config in enumerate(padding_config):
            term = pad_axis(term, axis, *config)
        terms.append(term)
    return eqn.rows_or_weight(FactoredArray(eqn(weight.base, value), tuple(terms)))


@defrule("concatenate")
def _concatenate(eqn, *operands, dimension):
    """Pads each term to the whole length, in the factor that owns the axis."""
    sizes = [operand.shape[dimension] for operand in operands]
    bases, terms = [], []
    for k, operand in enumerate(operands):
        if not isinstance(operand, FactoredArray):
            bases.append(operand)
            continue
        bases.append(operand.base)
        # concat(W1 + Δ1, W2 + Δ2)  =  concat(W1, W2)  +  [Δ1; 0]  +  [0; Δ2]
        low, high = sum(sizes[:k]), sum(sizes[k + 1 :])
        terms += [pad_axis(term, dimension, low, high) for term in operand.terms]
    return eqn.rows_or_weight(FactoredArray(eqn(*bases), tuple(terms)))


@defrule("stack")
def _stack(eqn, *operands, axis):
    """Gives each term the new axis as a label of size one, padded to the number of operands."""
    bases, terms = [], []
    for k, operand in enumerate(operands):
        if not isinstance(operand, FactoredArray):
            bases.append(operand)
            continue
        bases.append(operand.base)
        for term in operand.terms:
            # [*axes] -> [1, *axes] -> [operands, *axes], zero in all entries but the k-th
            new: tuple[Label, ...] = (term.fresh(1),)
            out = (*term.out[:axis], new, *term.out[axis:])
            stacked = dataclasses.replace(term, out=out)
            terms.append(pad_axis(stacked, axis, k, len(operands) - 1 - k))
    return eqn.rows_or_weight(FactoredArray(eqn(*bases), tuple(terms)))

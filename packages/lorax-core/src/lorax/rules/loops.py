"""Loops: `scan` and `while`, whose bodies are evaluated on weights in every step.

A scan slices the factors of a stack together with its base. A weight that is carried through a loop
unchanged becomes a constant of the loop.
"""

import dataclasses
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from .. import _compat
from .._coded import is_coded
from .._factored import is_weight
from .._paid import fold_keys
from .._registry import RULES, defrule, unfit
from .._terms import Inexpressible, Label


def _untouched(jaxpr, first: int) -> list[bool]:
    """Returns which carried values a loop's body returns unchanged; `first` is where they begin."""
    sources = _forwarded(jaxpr)
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    count = min(len(jaxpr.invars) - first, len(jaxpr.outvars))
    return [sources[k] == first + k for k in range(count)]


def _forwarded(jaxpr) -> list[int | None]:
    """Returns, per output, the position of the input that it is, also through nested bodies."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    origin: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        rule = RULES.get(eqn.primitive)
        # Without a rule the call materializes its weights, so its outputs are not its inputs.
        if rule is None or unfit(rule, len(eqn.invars), eqn.params):
            continue
        # A nested call hands values on: its outputs may be its inputs.
        if name in ("jit", "remat2", "closed_call"):
            inner = _forwarded(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
        elif name in ("scan", "while"):
            first, body = _loop_body(eqn)
            # A value that a loop carries without change is the loop's own input.
            kept = _untouched(body, first)
            # The operands of `while` are those of the condition first; the carried ones come last.
            start = len(eqn.invars) - len(kept) if name == "while" else first
            inner = [start + k if same else None for k, same in enumerate(kept)]
            inner += [None] * (len(eqn.outvars) - len(inner))
        else:
            continue
        for v, k in zip(eqn.outvars, inner, strict=True):
            source = None if k is None else eqn.invars[k]
            if not isinstance(source, jex.Literal) and source in origin:
                origin[v] = origin[source]
    return [None if isinstance(v, jex.Literal) else origin.get(v) for v in jaxpr.outvars]


def _loop_body(eqn) -> tuple[int, Any]:
    """Returns the body of a loop, and where the carried values begin among its inputs."""
    if eqn.primitive.name == "scan":
        return _scan_split(eqn.params)[0], eqn.params["jaxpr"]
    return eqn.params["body_nconsts"], eqn.params["body_jaxpr"]


def _scan_split(params) -> tuple[int, int]:
    try:
        return _compat.scan_split(params)
    except KeyError as missing:
        raise Inexpressible(
            f"has no parameter {missing} in JAX {jax.__version__}, which counts what it carries"
        ) from missing


def _carry(eqn, init, untouched):
    """Splits the carried values: unchanged weights become constants, others are materialized.

    Returns:
        The values to carry, a function that puts the constants back among them, and a function that
        maps the body's outputs to the values to carry.
    """
    # position -> the weight, for those that every step gets and returns unchanged
    fixed = {
        k: value
        for k, (value, same) in enumerate(zip(init, untouched, strict=True))
        if is_weight(value) and same
    }
    moving = [eqn.materialize(value) for k, value in enumerate(init) if k not in fixed]

    # [*moving] -> all carried values, in their order
    def whole(values):
        values = iter(values)
        return [fixed[k] if k in fixed else next(values) for k in range(len(init))]

    def moved(inside, values):
        return [inside.materialize(v) for k, v in enumerate(values) if k not in fixed]

    return moving, whole, moved


@defrule("while", gains=True)
def _while(eqn, *args, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr):
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    cond_consts, args = args[:cond_nconsts], args[cond_nconsts:]
    body_consts, init = args[:body_nconsts], args[body_nconsts:]
    moving, whole, moved = _carry(eqn, init, _untouched(body_jaxpr, body_nconsts))
    # The condition returns a scalar, the body the moving values as arrays.
    cond, body = eqn.body(cond_jaxpr), eqn.body(body_jaxpr, moved)
    # Constants are closed over; only the moving values are carried.
    final = jax.lax.while_loop(
        lambda carry: cond(*cond_consts, *whole(carry))[0],
        lambda carry: body(*body_consts, *whole(carry)),
        moving,
    )
    return whole(final)


@defrule("scan", gains=True)
def _scan(
    eqn,
    *args,
    jaxpr,
    reverse,
    length,
    unroll,
    _split_transpose=False,
    linear=None,
    num_consts=None,  # these three in JAX < 0.12, and the next two since then
    num_carry=None,
    ft_in=None,
    ft_out=None,
):
    n_consts, n_carry = _scan_split(eqn.eqn.params)
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    consts, init, xs = (
        args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    )  # fmt: skip
    moving, whole, moved = _carry(eqn, init, _untouched(jaxpr, n_consts)[:n_carry])
    split = [_unstack(eqn, x) for x in xs]

    def finish(inside, outs):
        # Codes are not stacked over steps, so a quantized weight is decoded first.
        stacked = [inside.materialize(x) if _has_codes(x) else x for x in outs[n_carry:]]
        return moved(inside, outs[:n_carry]), stacked

    run = eqn.body(jaxpr, finish)

    steps = (*consts, *init)
    # Dropout on a weight that all steps share needs a new mask per step, and some quantized stacks
    # are indexed by step: both need the step number.
    counts = any(is_weight(value) and value.keys is not None for value in steps)
    counts = counts or any(_has_codes(x) and _stays_whole(x.base) for x in xs)

    def body(carry, slices):
        slices, step = slices
        whole_slices = [
            rebuild((leaves, step)) for (_, rebuild), leaves in zip(split, slices, strict=True)
        ]
        # [consts, carry, slices] are the inputs of the body, in this order.
        every = (*consts, *whole(carry))
        if step is not None:
            every = tuple(_of_step(value, step) for value in every)
        return run(*every, *whole_slices)

    slices = [leaves for leaves, _ in split], jnp.arange(length) if counts else None
    final, stacked = jax.lax.scan(
        body,
        moving,
        slices,
        length=None if jax.tree.leaves(slices) else length,  # It may be symbolic: see `jax.export`.
        reverse=reverse,
        unroll=unroll,
        _split_transpose=_split_transpose,
    )
    return [*whole(final), *map(_restack, stacked)]


def _has_codes(value) -> bool:
    return is_weight(value) and is_coded(value.base)


def _of_step(value, step):
    if not is_weight(value) or value.keys is None:
        return value
    return dataclasses.replace(value, keys=fold_keys(value.keys, step))


def _unstack(eqn, weight):
    """Returns the arrays of a weight that a scan slices, and a function that rebuilds a slice.

    Factors that do not own the stacked axis are not sliced, since they are the same in every step.
    """
    try:
        if is_weight(weight) and weight.norm is not None:
            gone = weight.norm.term.out[0]
            if any(label.size != 1 and not weight.norm.term.owners(label) for label in gone):
                weight = weight.resolved()  # A step has a part of what the norm runs over.
        # The entries of a block, or the inputs of a meter, must stay together.
        if is_weight(weight) and weight.steps_through(0):
            raise Inexpressible
        # Axis 0 must be one label in every piece, which its owners are sliced along.
        owned = [piece.fuse(0) for piece in weight.pieces] if is_weight(weight) else None
    except Inexpressible:
        owned = None
    if owned is None:
        # The stack is materialized once, and the scan slices the array.
        return [eqn.materialize(weight)], lambda slices: slices[0][0]
    leaves, whole_base = _unstack_base(weight.base)
    count = len(leaves)
    for term, label in owned:
        for k in term.owners(label):
            # […, layers, …] -> [layers, …]: a scan slices the first axis.
            leaves.append(jnp.moveaxis(term.factors[k], term.labels[k].index(label), 0))

    def rebuild(slices):
        slices, step = slices
        base = whole_base(slices[:count], step)
        rest = iter(slices[count:])
        terms = []
        for term, label in owned:
            factors = tuple(
                next(rest) if label in labels else factor
                for factor, labels in zip(term.factors, term.labels, strict=True)
            )
            # A step has one entry of the stack, so the label is gone from factors and from the
            # shape.
            labels = tuple(tuple(name for name in names if name != label) for names in term.labels)
            terms.append(
                dataclasses.replace(term, factors=factors, labels=labels, out=term.out[1:])
            )
        return weight.with_pieces(base, terms)

    return leaves, rebuild


def _unstack_base(base):
    """Returns the arrays of a base that a scan slices, and a function that rebuilds one step.

    Where a stack of codes is not sliced, each step defers one more equation on it, which picks the
    step's entry.
    """
    if not is_coded(base):
        return [base], lambda leaves, _: leaves[0]
    if _stays_whole(base):
        return [], lambda _, step: base.entry(step)
    term, (label,) = base.term, base.term.out[0]
    # Scales may lack the stacked axis; these arrays are the same in every step.
    owners = term.owners(label)
    leaves = [jnp.moveaxis(term.factors[k], term.labels[k].index(label), 0) for k in owners]

    def whole(slices, _):
        factors, labels = list(term.factors), list(term.labels)
        for k, part in zip(owners, slices, strict=True):
            factors[k] = part
            labels[k] = tuple(other for other in labels[k] if other != label)
        entry = dataclasses.replace(
            term, factors=tuple(factors), labels=tuple(labels), out=term.out[1:]
        )
        return dataclasses.replace(base, term=entry, shape=base.shape[1:])

    return leaves, whole


def _stays_whole(base) -> bool:
    """Whether a stack of codes is not sliced: it was moved, or its first axis is in blocks."""
    return any(not move.commutes for move in base.moves) or len(base.term.out[0]) != 1


def _restack(value):
    """Gives a weight that a scan has stacked its new leading axis."""
    if not is_weight(value):
        return value
    pieces = []
    for piece in value.pieces:
        # [*labels] -> [steps, *labels] for every factor, since the scan stacked each of them.
        new: Label = piece.fresh(value.base.shape[0])
        labels = tuple((new, *labels) for labels in piece.labels)
        pieces.append(dataclasses.replace(piece, labels=labels, out=((new,), *piece.out)))
    return value.with_pieces(value.base, pieces)

"""Convolutions with terms that do not fall into two halves."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._contract import Operand, contract
from .._terms import Inexpressible, Label, Term
from ._windows import convolve


def has_parts(term: Term, rhs_spec) -> bool:
    """Whether the input features have several owners, or a factor owns nothing but the window."""
    _, in_axis, *spatial = rhs_spec
    try:
        term.fuse(in_axis)
    except Inexpressible:
        return True
    window = {label for d in spatial for label in term.out[d] if label.size != 1}
    others = {label for label in term.shown if label not in window}
    return any(window & set(labels) and others.isdisjoint(labels) for labels in term.labels)


class Plan(NamedTuple):
    """A term in three parts: the factors before the window, those along it, and those after it.

    `groups` are the labels of the feature groups, `inputs` those of the features of one group.
    """

    term: Term
    before: list[Operand]
    along: list[Operand]
    after: list[Operand]
    window: list[Label]
    groups: tuple[Label, ...]
    inputs: tuple[Label, ...]
    outputs: tuple[Label, ...]


def plan_of(term: Term, rhs_spec, groups: int) -> Plan:
    """Decides which factors are multiplied before, along and after the window."""
    out_axis, in_axis, *spatial = rhs_spec
    term, window = term.fuse_all(spatial)
    count, of_groups = groups, 0
    # The leading output labels run over the groups, until their sizes multiply to the number.
    while count > 1:
        label = term.out[out_axis][of_groups]
        if count % label.size:
            if label.size % count:
                raise Inexpressible("has groups that cut a block of its kernel in two")
            term, (label, _) = term.split(label, count)
        count, of_groups = count // label.size, of_groups + 1
    for label in term.out[out_axis]:
        term = term.own(label)
    inputs, outputs = term.out[in_axis], term.out[out_axis]
    # The input x has the labels of a group's inputs and of the groups themselves.
    of_x = {*inputs, *outputs[:of_groups]}
    factors = list(zip(term.factors, term.labels, strict=True))
    # Factors that own the window make the convolution itself. Factors that join x to these are
    # multiplied before it, and all others after it.
    along = [factor for factor in factors if not set(window).isdisjoint(factor[1])]
    owned = {label for _, labels in along for label in labels}
    if math.prod(label.size for label in owned) > math.prod(term.shape):
        raise Inexpressible("needs a kernel of its factors along the window that is larger than it")
    inner_labels = owned - of_x - {*window, *outputs}
    before, after = [], []
    for factor in factors:
        if set(window).isdisjoint(factor[1]):
            joins = not inner_labels.isdisjoint(factor[1]) and not of_x.isdisjoint(factor[1])
            (before if joins and set(outputs[of_groups:]).isdisjoint(factor[1]) else after).append(
                factor
            )
    return Plan(term, before, along, after, window, outputs[:of_groups], inputs, outputs)


def convolve_parts(x, plan: Plan, windows, numbers, precision, preferred):
    """Convolves with the factors of a plan; labels without the window become examples."""
    lhs_spec, out_spec = numbers.lhs_spec, numbers.out_spec
    spatial = len(windows)
    # As [batch, *spatial, features].
    x = jnp.transpose(x, [lhs_spec[0], *lhs_spec[2:], lhs_spec[1]])
    place = [plan.term.fresh(size, skip=k) for k, size in enumerate(x.shape[:-1])]
    # [batch, *spatial, *groups, *inputs]
    met = (*place, *plan.groups, *plan.inputs)
    x = x.reshape([label.size for label in met])
    keywords: dict[str, Any] = {"dtype": x.dtype, "precision": precision}

    def labels_of(operands):
        return list(dict.fromkeys(label for _, labels in operands for label in labels))

    # Labels that something after the window still needs.
    later = {*plan.outputs, *labels_of(plan.after)}
    needed = {*later, *labels_of(plan.along), *place}
    reached = dict.fromkeys((*met, *labels_of(plan.before)))
    middle = [label for label in reached if label in needed]
    features = [label for label in middle if label not in place]
    owned = [label for label in labels_of(plan.along) if label not in plan.window]
    groups = tuple(label for label in features if label in owned and label in later)
    summed = tuple(label for label in features if label in owned and label not in later)
    # Labels that the convolution adds, such as its side of the rank.
    new = tuple(label for label in owned if label not in features and label in later)
    # Not in the window's factors: these become examples.
    rest = tuple(label for label in features if label not in owned)

    def size(labels):
        return math.prod(label.size for label in labels)

    with jax.named_scope("lora"):
        # x as [batch · rest, *spatial, groups · summed], the kernel as [*window, summed, groups ·
        # new], and the result as [batch · rest, *spatial, groups · new]
        order = (place[0], *rest, *place[1:], *groups, *summed)
        x = contract([(x, met), *plan.before], order, meets=0, **keywords)
        x = x.reshape(size((place[0], *rest)), *x.shape[1 + len(rest) :][:spatial], -1)
        window = tuple(plan.window)
        kernel = contract(plan.along, (*window, *summed, *groups, *new), dtype=x.dtype)
        kernel = kernel.reshape(*kernel.shape[:spatial], size(summed), size((*groups, *new)))
        last = spatial + 1
        # (batch, features, *spatial) of x and of the result; (out, in, *window) of the kernel.
        axes = (0, last, *range(1, last))
        spec = jax.lax.ConvDimensionNumbers(axes, (last, spatial, *range(spatial)), axes)
        x = convolve(x, kernel, spec, windows, size(groups), 1, precision, None)
        fresh = [plan.term.fresh(n, skip=k + len(place)) for k, n in enumerate(x.shape[1:-1])]
        axes = (place[0], *rest, *fresh, *groups, *new)
        x = x.reshape([label.size for label in axes])
        # -> [batch, *spatial, *outputs] -> [batch, *spatial, out], and then the user's order of
        # axes
        out = (place[0], *fresh, *plan.outputs)
        keywords["preferred_element_type"] = preferred
        x = contract([(x, axes), *plan.after], out, meets=0, **keywords)
        x = x.reshape(*x.shape[:last], -1)
    layout = {out_spec[0]: 0, out_spec[1]: last} | {d: k for k, d in enumerate(out_spec[2:], 1)}
    return jnp.transpose(x, [layout[d] for d in range(x.ndim)])

"""`ragged_dot_general`: rows in groups, each multiplied by its own slice of a weight."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._contract import Operand, contract
from .._factored import FactoredArray
from .._paid import pay, with_dropout_on
from .._registry import defrule
from .._terms import Inexpressible, Label, Term


@defrule("ragged_dot_general", gains=True)
def _ragged_dot_general(
    eqn,
    left,
    right,
    group_sizes,
    *,
    ragged_dot_dimension_numbers,
    precision,
    preferred_element_type,
    group_offset,
    out_sharding=None,
):
    """Multiplies rows that are sorted by expert, each group by one slice of the weight."""
    numbers = ragged_dot_dimension_numbers
    (l_sum, r_sum), (l_batch, _) = numbers.dot_dimension_numbers
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if isinstance(left, FactoredArray) or isinstance(group_sizes, FactoredArray):
        return NotImplemented
    if group_offset is not None or l_batch or len(groups) != 1 or ragged[0] in l_sum:
        return NotImplemented
    eqn.use(right, "product")
    pay_result = lambda result: result  # noqa: E731
    met = left
    if not right.is_sum:
        right, met, pay_result = _paid_by_rows(eqn, right, left, group_sizes, numbers, precision)
    deltas, in_parts = [], []
    for term in right.terms:
        kept = [d for d in range(len(term.out)) if d not in (*r_sum, *groups)]
        if _is_in_parts(term, (*r_sum, *kept)):
            # Blocks with different owners cannot be fused into one axis: multiply in steps.
            in_parts.append(_steps(term, left, l_sum, r_sum, groups[0]))
            continue
        fused, labels = term.fuse_all((*r_sum, *groups, *kept))
        inputs, group, outputs = labels[: len(r_sum)], labels[len(r_sum)], labels[-len(kept) :]
        first, second, inner_labels = fused.split_factors(inputs, outputs)
        inner_labels = [label for label in inner_labels if label != group]
        deltas.append((first, second, inputs, inner_labels, outputs, group))
    # The axes of the rows that the result keeps.
    free = [d for d in range(left.ndim) if d not in l_sum]
    dtype = eqn.product_dtype(left, right.base)
    base = eqn(met, right.base, group_sizes)

    def delta_of(rows, first, second, inputs, inner_labels, outputs, group):

        def multiply(x, summed, ragged_axis, half, inputs, outputs, preferred, group=group):
            # A half without the group label is shared by all experts: an ordinary product.
            # Whether each group has its own version of this half.
            owned = any(group in labels for _, labels in half)
            kernel_axes = ((group,) if owned else ()) + (*inputs, *outputs)
            kernel = contract(half, kernel_axes, dtype=dtype)
            dots = ((summed, list(range(owned, owned + len(inputs)))), ([], []))
            keywords = {"precision": precision, "preferred_element_type": preferred}
            if not owned:
                return jax.lax.dot_general(x, kernel, dots, **keywords)
            ragged_numbers = jax.lax.RaggedDotDimensionNumbers(dots, [ragged_axis], [0])
            return jax.lax.ragged_dot_general(x, kernel, group_sizes, ragged_numbers, **keywords)

        with jax.named_scope("lora"):
            # rows [*free, in] · first [(group), in, inner] -> [*free, inner]
            middle = multiply(
                rows.astype(dtype), l_sum, ragged[0], first, inputs, inner_labels, None
            )
            summed = list(range(len(free), middle.ndim))
            ragged_axis = free.index(ragged[0])
            # [*free, inner] · second [(group), inner, out] -> [*free, out]
            delta = multiply(
                middle, summed, ragged_axis, second, inner_labels, outputs, preferred_element_type
            )
        return delta.reshape(base.shape).astype(base.dtype)

    def with_terms(rows):
        total = functools.reduce(lambda total, delta: total + delta_of(rows, *delta), deltas, base)
        for steps in in_parts:
            delta = _multiply_in_steps(
                rows.astype(dtype), group_sizes, steps, precision, preferred_element_type
            )
            total = total + delta.reshape(base.shape).astype(base.dtype)
        return total

    return pay_result(with_dropout_on(met, eqn.with_own_keys(right), {}, with_terms))


def _paid_by_rows(eqn, weight, rows, group_sizes, numbers, precision):
    """Moves gains and turn to the rows and the result, where each row takes those of its group.

    Returns:
        The weight without them, the rows, and a function to apply to the result.
    """
    (l_sum, r_sum), _ = numbers.dot_dimension_numbers
    (group,), (ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    free = [d for d in range(rows.ndim) if d not in l_sum]
    kept = [d for d in range(len(weight.shape)) if d not in (*r_sum, group)]
    met = dict(zip(r_sum, l_sum, strict=True)) | {group: ragged}
    shown = {d: len(free) + k for k, d in enumerate(kept)} | {group: free.index(ragged)}
    count = rows.shape[ragged]

    def entries(array, axes):
        if group not in axes:
            return array
        # […, group, …] -> […, row, …]: each row takes the entry of its expert.
        return jnp.repeat(array, group_sizes, axes.index(group), total_repeat_length=count)

    def turned(turn, array, places, *, by_rows=False, precision=None):
        if group not in turn.varying:
            return turn.applied_to(array, places, by_rows=by_rows, precision=precision)
        if array.ndim != 2 or places[turn.axis] != 1 or {*turn.varying} != {group, turn.axis}:
            raise Inexpressible
        row = turn.term.fresh(array.shape[0])
        other = turn.term.fresh(turn.label.size, skip=1)
        inputs, (label,) = turn.term.out[turn.axis], turn.term.out[group]
        outputs = tuple(other if x == turn.label else x for x in inputs)
        factors = turn.factors(by_rows=by_rows, other=other)
        steps = _Steps(row, inputs, label, factors, outputs)
        with jax.named_scope("lora"):
            delta = _multiply_in_steps(array, group_sizes, steps, precision, None)
            return array + delta.astype(array.dtype)

    rows = weight.metered(rows, met, group_sizes=group_sizes)
    return pay(weight, rows, met, shown, entries, turned, precision)


def _is_in_parts(term: Term, axes) -> bool:
    """Whether one of the axes consists of blocks that different factors own."""
    try:
        term.fuse_all(axes, own=False)
    except Inexpressible:
        return True
    return False


class _Steps(NamedTuple):
    """The factors in the order in which they meet the rows, and the labels at both ends."""

    row: Label
    inputs: tuple[Label, ...]
    group: Label
    factors: list[Operand]
    outputs: tuple[Label, ...]


def _steps(term: Term, rows, l_sum, r_sum, group_axis: int) -> _Steps:
    if rows.ndim != 2 or list(l_sum) != [1] or len(term.out) != 3:
        raise Inexpressible
    (out_axis,) = {0, 1, 2} - {*r_sum, group_axis}
    term, group = term.fuse(group_axis)
    inputs, outputs = term.out[r_sum[0]], term.out[out_axis]
    for label in outputs:
        term = term.own(label)
    # A factor that shares no label with what was met so far has to wait for one that does.
    rest, ordered, met = list(zip(term.factors, term.labels, strict=True)), [], {*inputs}
    while rest:
        k = next((k for k, (_, labels) in enumerate(rest) if met.intersection(labels)), None)
        if k is None:
            raise Inexpressible
        ordered.append(rest.pop(k))
        met.update(label for label in ordered[-1][1] if label != group)
    if not term.owners(group):
        raise Inexpressible
    return _Steps(term.fresh(rows.shape[0]), inputs, group, ordered, outputs)


def _multiply_in_steps(x, group_sizes, steps: _Steps, precision, preferred):
    """Multiplies rows by one factor after another; labels that a factor lacks act as rows."""
    row, labels = steps.row, (steps.row, *steps.inputs)
    # later[k]: the labels of factor k, of all factors after it, and of the outputs.
    later = [{*steps.outputs}]
    for _, factor_labels in reversed(steps.factors):
        later.append(later[-1] | {*factor_labels})
    later.reverse()

    def size(labels):
        return math.prod(label.size for label in labels)

    def arranged(x, labels, kept):
        return contract([(x, labels)], kept, dtype=x.dtype)

    with jax.named_scope("lora"):
        x = x.reshape([label.size for label in labels])
        kept = tuple(label for label in labels if label == row or label in later[0])
        x, labels = arranged(x, labels, kept), kept
        for (factor, factor_labels), needed in zip(steps.factors, later[1:], strict=True):
            both = [label for label in labels if label in factor_labels]
            batch = tuple(label for label in both if label in needed)
            summed = tuple(label for label in both if label not in needed)
            rest = tuple(label for label in labels if label not in factor_labels and label != row)
            owned = steps.group in factor_labels
            new = tuple(x for x in factor_labels if x not in both and x != steps.group)
            axes = (*batch, *((steps.group,) if owned else ()), *summed, *new)
            kernel = arranged(factor.astype(x.dtype), factor_labels, axes)
            # x [batch, row · rest, summed] · kernel [batch, (group), summed, new] -> [batch, row ·
            # rest, new]
            x = arranged(x, labels, (*batch, row, *rest, *summed))
            x = x.reshape(size(batch), -1, size(summed))
            kernel = kernel.reshape(
                size(batch), *([steps.group.size] if owned else []), size(summed), size(new)
            )
            keywords = {"precision": precision, "preferred_element_type": preferred}
            if owned:
                # Each row has become `rest` adjacent rows of the same expert.
                sizes = group_sizes * size(rest)
                dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, **keywords)
            else:
                dot = functools.partial(jnp.dot, **keywords)
            # `ragged_dot` has no batch axes, so there is one product per block.
            x = jnp.stack([dot(*both) for both in zip(x, kernel, strict=True)])
            # [batch, row · rest, new] -> one axis per label
            labels = (*batch, row, *rest, *new)
            x = x.reshape([label.size for label in labels])
        return arranged(x, labels, (row, *steps.outputs)).reshape(row.size, -1)

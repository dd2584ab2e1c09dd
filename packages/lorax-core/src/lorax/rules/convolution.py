"""Convolutions with an adapted kernel.

    conv(x, W + Σ terms)  =  conv(x, W)  +  Σ second(first(x))

A term is split into two halves: the factors that own the input features, and the rest. Each spatial
axis of the window belongs to one half, which takes the stride, padding and dilations of that axis;
the other half has a window of size one there. If the window is in the first half, the second half
is a product over the rank alone.

Sharp edges:

* Feature groups: the input axis of `W` has the features of one group, and its output axis runs over
  the groups. The first kernel is the same for every group, so it is repeated; the second is cut by
  group. In a depthwise convolution, this takes rank times the arithmetic of the base, so keep the
  rank small there. On a single CPU, groups become examples instead, and the first kernel is not
  repeated: XLA takes many times as long for the gradient of a grouped kernel.
* Stacked kernels: `vmap` merges the stack into the output axis, whose first labels both halves
  then own. Each entry of the stack has a first kernel of its own, and a group of its own in the
  product over the rank. Kernels that differ only by a gain over the inputs, as in a modulated
  convolution, are such a stack, whose entries share the second kernel.
* Batch groups: the output axis of `W` runs over the groups of the batch. The first kernel is
  applied to the whole batch, and the second to each part of it with the outputs of that part.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._contract import is_for_one_cpu
from .._factored import FactoredArray
from .._paid import pay, with_dropout_on
from .._registry import defrule
from .._terms import Inexpressible, Label, Term
from ._windows import Window, convolve
from .convolution_parts import Plan, convolve_parts, has_parts, plan_of


@defrule("conv_general_dilated", gains=True)
def _conv_general_dilated(
    eqn,
    x,
    kernel,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    precision,
    preferred_element_type,
    out_sharding=None,
):
    if isinstance(x, FactoredArray):
        # A learned input, such as a generator's first array: only the kernel stays factored.
        x = eqn.materialize(x, "takes it as the input and not as the kernel")
    if not isinstance(kernel, FactoredArray):
        return eqn(x, kernel)
    windows = [
        Window(*axis)
        for axis in zip(window_strides, padding, lhs_dilation, rhs_dilation, strict=True)
    ]
    dtype = eqn.product_dtype(x, kernel.base)
    rhs_spec = dimension_numbers.rhs_spec
    eqn.use(kernel, "product")
    _check_groups(kernel, rhs_spec[0], max(feature_group_count, batch_group_count))
    lhs_spec, out_spec = dimension_numbers.lhs_spec, dimension_numbers.out_spec
    # The kernel's axis of inputs meets the features of x; its axis of outputs is that of the
    # result.
    met, shown = {rhs_spec[1]: lhs_spec[1]}, {rhs_spec[0]: out_spec[1]}
    if kernel.meter is not None:
        if batch_group_count > 1:
            raise Inexpressible("has groups of examples")
        x = _metered(kernel, x, windows, dimension_numbers, feature_group_count)
    kernel, x, pay_result = pay(kernel, x, met, shown, precision=precision)
    stages = [
        plan_of(term, rhs_spec, feature_group_count)
        if batch_group_count == 1 and has_parts(term, rhs_spec)
        else _stages(term, rhs_spec, feature_group_count, batch_group_count, dtype)
        for term in kernel.terms
    ]
    base = eqn(x, kernel.base)

    def delta_of(x, stage):
        if isinstance(stage, Plan):
            return convolve_parts(
                x, stage, windows, dimension_numbers, precision, preferred_element_type
            )
        return _convolve(
            x, stage, windows, dimension_numbers, feature_group_count, batch_group_count,
            precision, preferred_element_type,
        )  # fmt: skip

    def with_terms(x):
        # conv(x, W + Σ t)  =  conv(x, W) + Σ conv(conv(x, first of t), second of t)
        total, x = base, x.astype(dtype)
        for stage in stages:
            total = total + delta_of(x, stage).astype(total.dtype)
        return total

    return pay_result(with_dropout_on(x, eqn.with_own_keys(kernel), {}, with_terms))


def _metered(kernel: FactoredArray, x, windows, numbers, groups: int):
    """Returns the input, metered by its patches, which are the rows that meet the kernel."""
    _, in_axis, *spatial = numbers.rhs_spec
    window = [kernel.shape[d] for d in spatial]
    channels = kernel.shape[in_axis]

    def spread(x):
        # [batch, groups · channels · window, *places]
        patches = jax.lax.conv_general_dilated_patches(
            x,
            window,
            [w.stride for w in windows],
            [w.padding for w in windows],
            [w.lhs_dilation for w in windows],
            [w.rhs_dilation for w in windows],
            dimension_numbers=jax.lax.ConvDimensionNumbers(
                numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec
            ),
            precision=jax.lax.Precision.HIGHEST,
        )
        # [batch, *places, groups · channels · window] -> [batch, *places, groups, channels,
        # *window]
        patches = jnp.moveaxis(patches, numbers.lhs_spec[1], -1)
        return patches.reshape(*patches.shape[:-1], groups, channels, *window)

    first = x.ndim  # [*batch and places, groups, channels, *window]
    places = {in_axis: first} | {d: first + 1 + k for k, d in enumerate(spatial)}
    return kernel.metered(x, places, spread=spread)


def _check_groups(kernel: FactoredArray, out_axis: int, groups: int) -> None:
    """Raises if a turn on the outputs has blocks that reach into another group."""
    turn = kernel.turn
    if turn is None or turn.axis != out_axis:
        return
    labels = turn.term.out[out_axis]
    # The labels after that of the block subdivide one of its entries.
    block = math.prod(label.size for label in labels[labels.index(turn.label) :])
    if kernel.shape[out_axis] // groups % block != 0:
        raise Inexpressible("has groups that cut a block of its kernel in two")


class _Stages(NamedTuple):
    """The two kernels of a term, as [out, in, *window].

    The first consists of `blocks`, each of which is used for `repeats` groups. `in_first` has one
    entry per axis of the window: whether the first kernel owns it.
    """

    first: jax.Array
    second: jax.Array
    in_first: list[bool]
    blocks: int
    repeats: int


def _stages(term: Term, rhs_spec, groups: int, batch_groups: int, dtype) -> _Stages:
    """Splits a term into its two kernels."""
    out_axis, *in_axes = rhs_spec
    term, (inner, *window) = term.fuse_all(in_axes)
    outputs = term.out[out_axis]
    if not outputs:
        term, label = term.fuse(out_axis)
        outputs = (label,)
    for label in outputs:
        term = term.own(label)
    # Output labels in a factor with the inputs: a stack of first kernels, one for each entry.
    beside_inputs = {label for labels in term.labels if inner in labels for label in labels}
    stack = [label for label in outputs if label in beside_inputs]
    first, second, inner_labels = term.split_factors(
        [inner], [label for label in outputs if label not in stack]
    )
    if not set(inner_labels).isdisjoint(window):
        raise Inexpressible
    # first [*stack, in, rank, *window] and second [*outputs, rank, *window]
    rank = tuple(label for label in inner_labels if label not in stack)
    # A window axis belongs to the half whose factors own it.
    in_first = [any(label in labels for _, labels in first) for label in window]

    # The outputs consist of blocks, each with a first kernel of its own. The number of groups must
    # be a multiple of the number of blocks, or the other way around.
    blocks = outputs[: max((outputs.index(label) + 1 for label in stack), default=0)]
    count = math.prod(label.size for label in blocks)
    if max(groups, count) % min(groups, count) or (stack and batch_groups > 1):
        raise Inexpressible
    mine = [label for label, owned in zip(window, in_first, strict=True) if owned]
    others = [label for label in window if label not in mine]
    sizes = [
        math.prod(label.size for label in labels)
        for labels in ((*blocks, *rank, inner, *mine), (*outputs, *rank, *others))
    ]
    # The first kernels of all blocks can be as large as the weight, and then nothing is gained.
    if stack and max(sizes) >= math.prod(term.shape):
        raise Inexpressible("needs a kernel for each group that are together as large as it")

    def kernel(half, outputs, inputs, owned):
        factors, labels = zip(*half, strict=True)
        spatial = ((label,) if own else () for label, own in zip(window, owned, strict=True))
        # [*factors] -> [out, in, *window], with a window of one where the half does not own it
        return Term(factors, labels, (outputs, inputs, *spatial)).array(dtype)

    repeats = max(groups // count, 1)
    return _Stages(
        kernel(first, (*blocks, *rank), (inner,), in_first),
        kernel(second, outputs, rank, [not own for own in in_first]),
        in_first,
        count,
        repeats,
    )


def _convolve(x, stages, windows, numbers, groups, batch_groups, precision, preferred):
    first, second, in_first, blocks, repeats = stages
    lhs_spec, out_spec, rhs_spec = numbers.lhs_spec, numbers.out_spec, numbers.rhs_spec

    def conv(x, kernel, lhs_spec, owned, groups, batch_groups, preferred):
        spec = jax.lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec)
        # The other half has a window of size one: stride 1, no padding, no dilation.
        mine = [w if own else Window() for w, own in zip(windows, owned, strict=True)]
        # [out, in, *window] -> the order of axes in the user's kernel
        layout = sorted(range(kernel.ndim), key=lambda d: rhs_spec[d])
        kernel = jnp.transpose(kernel, layout)
        return convolve(x, kernel, spec, mine, groups, batch_groups, precision, preferred)

    with jax.named_scope("lora"):
        if blocks == 1 < repeats and all(in_first) and is_for_one_cpu([x]):
            x, groups, batch_groups, repeats = _as_examples(x, lhs_spec, groups), 1, groups, 1
        # [blocks · rank, in, *window] -> [blocks · repeats · rank, in, *window]: every group of a
        # block has the kernel of the block.
        repeated = jnp.tile(first.reshape(blocks, -1), (1, repeats)).reshape(-1, *first.shape[1:])
        all_groups = blocks * repeats
        # x [batch, in, *places] -> [batch, groups · rank, *places]
        middle = conv(x, repeated, lhs_spec, in_first, groups, 1, None)
        # The window, or a part of it, is in the second kernel: it is a convolution as well.
        if not all(in_first):
            in_second = [not own for own in in_first]
            return conv(middle, second, out_spec, in_second, all_groups, batch_groups, preferred)
    return _mix_features(middle, second, out_spec, all_groups, batch_groups, precision, preferred)


def _as_examples(x, lhs_spec, groups: int):
    """Makes every group of features a separate example, all examples of group 0 first."""
    batch_axis, feature_axis, *_ = lhs_spec
    shape = list(x.shape)
    shape[feature_axis] //= groups
    grouped = x.reshape(*shape[:feature_axis], groups, *shape[feature_axis:])
    shape[batch_axis] *= groups
    # [batch, groups · in] -> [groups, batch, in] -> [groups · batch, in]
    return jnp.moveaxis(grouped, feature_axis, batch_axis).reshape(shape)


def _mix_features(x, kernel, out_spec, groups, batch_groups, precision, preferred):
    """Multiplies over the rank, group by group: [batch, groups·rank, …] to [batch, out, …]."""
    batch_axis, feature_axis, *_ = out_spec
    out_size, rank = kernel.shape[:2]
    count = max(groups, batch_groups)
    # x [batch, group, rank, *places] · kernel [group, out, rank] -> [batch, group, out, *places]
    group, inner = Label(0, count), Label(1, rank)
    out, batch = Label(2, out_size // count), Label(3, x.shape[batch_axis] // batch_groups)
    axes: list[tuple[Label, ...]] = [(Label(4 + d, size),) for d, size in enumerate(x.shape)]
    out_axes: list[tuple[Label, ...]] = list(axes)
    axes[batch_axis], axes[feature_axis] = (batch,), (inner,)
    out_axes[batch_axis], out_axes[feature_axis] = (batch,), (out,)
    if groups > 1:
        axes[feature_axis] = (group, inner)
    if batch_groups > 1:
        axes[batch_axis] = (group, batch)
    kernel_axes = (out, inner)
    if count > 1:
        kernel_axes = (group, out, inner)
        out_axes[feature_axis] = (group, out)
    flat = [label for axis in axes for label in axis]
    term = Term(
        (
            x.reshape([label.size for label in flat]),
            kernel.reshape([label.size for label in kernel_axes]),
        ),
        (tuple(flat), kernel_axes),
        tuple(out_axes),
    )
    return term.array(x.dtype, precision=precision, preferred_element_type=preferred)

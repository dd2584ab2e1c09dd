"""Convolutions with an adapted kernel.

    conv(x, W + Σ terms)  =  conv(x, W)  +  Σ second(first(x))

A term falls into two halves: the factors that own the input features, and the rest. Each spatial
axis of the window belongs to one half, which takes that axis's stride, padding and dilations;
the other half sees a window of one there. With the window in the first half the second is a
product over the rank alone.

Sharp edges:

* Feature groups: `W`'s input axis is one group's share and its output axis runs over the groups.
  The first kernel serves every group, so it is repeated for each; the second is cut by group. In
  a depthwise convolution that is rank times the base's arithmetic: keep the rank small there.
* Batch groups: the output axis of `W` runs over the groups of the batch, so the first kernel
  sees the batch whole, and the second meets each part of it with its own outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._contract import contract, product_dtype
from .._registry import defrule
from .._terms import FactoredArray, Inexpressible, Label, Term


class _Window(NamedTuple):
    """Stride, padding and dilations along one spatial axis."""

    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    lhs_dilation: int = 1
    rhs_dilation: int = 1


@defrule("conv_general_dilated")
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
        return NotImplemented
    windows = [
        _Window(*axis)
        for axis in zip(window_strides, padding, lhs_dilation, rhs_dilation, strict=True)
    ]
    dtype = product_dtype(x.dtype, eqn.out_dtype)
    stages = [_stages(term, dimension_numbers.rhs_spec, dtype) for term in kernel.terms]
    base, x = eqn(x, kernel.base), x.astype(dtype)
    out_axis, *in_axes = dimension_numbers.rhs_spec
    for term, (first, second, owns_window) in zip(kernel.terms, stages, strict=True):
        eqn.use_axes(term, in_axes, [out_axis])
        delta = _convolve(
            x, first, second, owns_window, windows, dimension_numbers,
            feature_group_count, batch_group_count, precision, preferred_element_type,
        )  # fmt: skip
        base = base + delta.astype(base.dtype)
    return base


def _stages(term: Term, rhs_spec, dtype):
    """The two kernels as [out, in, *window], and whether the first owns each window axis."""
    term, (out, inner, *window) = term.fuse_all(rhs_spec)
    first, second, bonds = term.halves([inner], [out])
    if not set(bonds).isdisjoint(window):
        raise Inexpressible
    in_first = [any(label in labels for _, labels in first) for label in window]
    rank = Label(-1, 1)
    for label in bonds:
        rank = rank._replace(size=rank.size * label.size)

    def kernel(half, outputs, inputs, owned):
        mine = [label for label, own in zip(window, owned, strict=True) if own]
        array = contract(half, (*outputs, *inputs, *mine), dtype=dtype)
        sizes = [label.size if own else 1 for label, own in zip(window, owned, strict=True)]
        out_size = rank.size if outputs == bonds else out.size
        return array.reshape(out_size, -1, *sizes)

    in_second = [not own for own in in_first]
    return (
        kernel(first, bonds, (inner,), in_first),
        kernel(second, (out,), bonds, in_second),
        in_first,
    )


def _convolve(
    x, first, second, in_first, windows, numbers, groups, batch_groups, precision, preferred
):
    out_spec, rhs_spec = numbers.out_spec, numbers.rhs_spec

    def conv(x, kernel, lhs_spec, owned, batch_groups, preferred):
        spec = jax.lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec)
        mine = [w if own else _Window() for w, own in zip(windows, owned, strict=True)]
        layout = sorted(range(kernel.ndim), key=lambda d: rhs_spec[d])
        return jax.lax.conv_general_dilated(
            x,
            jnp.transpose(kernel, layout),
            [w.stride for w in mine],
            [w.padding for w in mine],
            [w.lhs_dilation for w in mine],
            [w.rhs_dilation for w in mine],
            spec,
            feature_group_count=groups,
            batch_group_count=batch_groups,
            precision=precision,
            preferred_element_type=preferred,
        )

    with jax.named_scope("lora"):
        repeated = jnp.tile(first.reshape(1, -1), (groups, 1)).reshape(-1, *first.shape[1:])
        middle = conv(x, repeated, numbers.lhs_spec, in_first, 1, None)
        if not all(in_first):
            in_second = [not own for own in in_first]
            return conv(middle, second, out_spec, in_second, batch_groups, preferred)
    return _mix_features(middle, second, out_spec, groups, batch_groups, precision, preferred)


def _mix_features(x, kernel, out_spec, groups, batch_groups, precision, preferred):
    """The product over the rank, group by group: [batch, groups·rank, …] to [batch, out, …]."""
    batch_axis, feature_axis, *_ = out_spec
    out_size, rank = kernel.shape[:2]
    count = max(groups, batch_groups)
    group, bond = Label(0, count), Label(1, rank)
    out, batch = Label(2, out_size // count), Label(3, x.shape[batch_axis] // batch_groups)
    axes: list[tuple[Label, ...]] = [(Label(4 + d, size),) for d, size in enumerate(x.shape)]
    found: list[tuple[Label, ...]] = list(axes)
    axes[batch_axis], axes[feature_axis] = (batch,), (bond,)
    found[batch_axis], found[feature_axis] = (batch,), (out,)
    if groups > 1:
        axes[feature_axis] = (group, bond)
    if batch_groups > 1:
        axes[batch_axis] = (group, batch)
    kernel_axes = (out, bond)
    if count > 1:
        kernel_axes = (group, out, bond)
        found[feature_axis] = (group, out)
    flat = [label for axis in axes for label in axis]
    term = Term(
        (
            x.reshape([label.size for label in flat]),
            kernel.reshape([label.size for label in kernel_axes]),
        ),
        (tuple(flat), kernel_axes),
        tuple(found),
    )
    return term.array(x.dtype, precision=precision, preferred_element_type=preferred, meets=0)

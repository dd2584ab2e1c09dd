"""Convolutions over windows, whose padding may be symbolic."""

from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp


class Window(NamedTuple):
    """Stride, padding and dilations along one spatial axis."""

    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    lhs_dilation: int = 1
    rhs_dilation: int = 1


def convolve(x, kernel, spec, windows, groups, batch_groups, precision, preferred):
    if any(jax.export.is_symbolic_dim(size) for w in windows for size in w.padding):
        x, windows = _pad_first(x, spec.lhs_spec, windows)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        [w.stride for w in windows],
        [w.padding for w in windows],
        [w.lhs_dilation for w in windows],
        [w.rhs_dilation for w in windows],
        spec,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        precision=precision,
        preferred_element_type=preferred,
    )


def _pad_first(x, lhs_spec, windows):
    """Returns the input padded and dilated, and windows without padding or dilation.

    `jax.lax.conv_general_dilated` does not accept padding that depends on a symbolic size of
    `jax.export`, as "SAME" does with strides; the primitive does.
    """
    config = [(0, 0, 0)] * x.ndim
    for axis, window in zip(lhs_spec[2:], windows, strict=True):
        config[axis] = (*window.padding, window.lhs_dilation - 1)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    return x, [w._replace(padding=(0, 0), lhs_dilation=1) for w in windows]

"""Average pooling, whose last windows torchax 0.0.13 divides wrongly with `ceil_mode`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch


def _average_pool(
    x: jax.Array,
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    inner = len(window)
    stride = tuple(stride or window)
    padding = [padding] if isinstance(padding, int) else list(padding)
    pads = padding * (inner // len(padding))
    sizes = x.shape[-inner:]
    ends = [
        _padding_at_the_end(*each, ceil_mode)
        for each in zip(sizes, window, stride, pads, strict=True)
    ]

    def total(value: jax.Array, starts: Sequence[int], ends: Sequence[int]) -> jax.Array:
        ones, none = (1,) * (value.ndim - inner), [(0, 0)] * (value.ndim - inner)
        around = [*none, *zip(starts, ends, strict=True)]
        zero = np.zeros((), value.dtype)  # not traced, so that JAX knows the gradient
        return jax.lax.reduce_window(
            value, zero, jax.lax.add, (*ones, *window), (*ones, *stride), around
        )

    result = total(x, pads, ends)  # [*outer, *windows]
    if divisor_override is not None:
        return result / jnp.asarray(divisor_override, x.dtype)
    counted = jnp.ones(sizes, x.dtype)
    if count_include_pad:
        # A window that `ceil_mode` adds is divided by its part within the padding.
        counted = jnp.pad(counted, [(pad, pad) for pad in pads], constant_values=1)
        rest = [end - pad for end, pad in zip(ends, pads, strict=True)]
        return result / total(counted, [0] * inner, rest)
    return result / total(counted, pads, ends)


def _padding_at_the_end(size: int, window: int, stride: int, pad: int, ceil_mode: bool) -> int:
    steps = size + 2 * pad - window
    last = -(-steps // stride) if ceil_mode else steps // stride
    if last * stride >= size + pad:  # no window starts in the padding at the end
        last -= 1
    return max(pad, last * stride + window - pad - size)


OPERATORS = dict.fromkeys(
    (torch.ops.aten.avg_pool1d, torch.ops.aten.avg_pool2d, torch.ops.aten.avg_pool3d),
    _average_pool,
)

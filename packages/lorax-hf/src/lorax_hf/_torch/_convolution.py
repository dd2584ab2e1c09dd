"""Grouped transposed convolutions, whose kernels torchax 0.0.13 assigns to the wrong groups."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch


def _convolution(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    from torchax.ops.jaten import _aten_convolution

    if transposed and groups > 1:
        options = (stride, padding, dilation, True, output_padding, 1)
        inputs = jnp.split(input, groups, axis=-weight.ndim + 1)
        kernels = jnp.split(weight, groups)
        results = [
            _aten_convolution(x, kernel, None, *options)
            for x, kernel in zip(inputs, kernels, strict=True)
        ]
        result = jnp.concatenate(results, axis=-weight.ndim + 1)
        return result if bias is None else result + bias.reshape(-1, *[1] * (weight.ndim - 2))
    return _aten_convolution(
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


OPERATORS = {torch.ops.aten.convolution: _convolution}

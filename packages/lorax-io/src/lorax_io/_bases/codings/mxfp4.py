"""MXFP4 of experts, as in gpt-oss: `down_proj_blocks` and `down_proj_scales`."""

import jax.numpy as jnp
import numpy as np

from lorax import MXFP4

from ..._places import Array
from .coding import AnyCoded, Coded, Part, Tensors, expect, need, nibbles


def find(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """A parameter (experts, in, out), whose codes are stored as (experts, out, groups, bytes)."""
    name = f"{module}.{parameter}"
    blocks, scale = f"{name}_blocks", f"{name}_scales"
    if blocks not in tensors:
        return None
    data = need(tensors, blocks, ndim=4, dtypes=[np.uint8])
    experts, outputs, groups, half = data.shape
    scales = need(tensors, scale, dtypes=[np.uint8])
    expect(scale, scales, data.shape[:3])
    shape = (experts, groups * 2 * half, outputs)

    def codes(rows: slice) -> Array:
        return nibbles(data[rows]).reshape(-1, outputs, shape[1]).swapaxes(1, 2)

    parts = {
        "codes": Part(codes, (1, 1, 1), shape, jnp.uint4),
        "scales": Part(
            lambda rows: scales[rows].swapaxes(1, 2),
            (1, 2 * half, 1), (experts, groups, outputs), scales.dtype,
        ),
    }  # fmt: skip
    return Coded((blocks, scale), MXFP4(2 * half), parts, shape, np.dtype(jnp.bfloat16))

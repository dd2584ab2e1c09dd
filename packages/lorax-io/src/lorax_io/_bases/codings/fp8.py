"""FP8 with `weight_scale_inv`: a scale for each block of 128 × 128, as in DeepSeek-V3, or one."""

import math

import jax.numpy as jnp
import numpy as np

from lorax import FP8

from ..._errors import AdapterFileError
from .coding import AnyCoded, Coded, Tensors, expect, need, need_scales, setting, stored, whole

SIDES = (128, 128)


def find(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """A weight with a scale for each block, or one; the last block of an axis may be cut."""
    weight = f"{module}.{parameter}"
    scale = f"{weight}_scale_inv"
    if scale not in tensors:
        return None
    codes = need(tensors, weight, dtypes=[jnp.float8_e4m3fn])
    scales = need_scales(tensors, scale, of_floats=True)
    sides = setting(tensors, "weight_block_size", SIDES)
    rest = codes.shape[:-2]
    if sides is None:  # one scale, or one for each expert
        sides = codes.shape[-2:]
        if scales.size == math.prod(rest):
            scales = scales.reshape(*rest, 1, 1)
    if not isinstance(sides, list | tuple) or len(sides) != 2 or codes.ndim < 2 or not all(
        type(side) is int and side > 0 for side in sides
    ):  # fmt: skip
        raise AdapterFileError(f"has blocks of {sides!r} for `{weight}` {codes.shape}.")
    blocks = tuple(-(-n // side) for n, side in zip(codes.shape[-2:], sides, strict=True))
    expect(scale, scales, (*rest, *blocks))
    ones = (1,) * len(rest)
    parts = {
        "codes": whole(codes, (*ones, 1, 1)),
        "scales": whole(scales, (*ones, *sides)),
    }
    codec = FP8(block=sides[1], square=True)
    as_is = stored(codes=(weight, codes), scales=(scale, tensors.view(scale)))
    if scales.dtype.itemsize == 1:
        as_is = {}
    dtype = np.dtype(jnp.bfloat16)
    return Coded((weight, scale), codec, parts, codes.shape, dtype, stored=as_is)

"""compressed-tensors: packed integers, integers and FP8 with scales, NVFP4 and MXFP4."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import FP8, MXFP4, Int4, Int8
from lorax.bases import NVFP4

from ..._errors import AdapterFileError, UnsupportedAdapterError
from ..._places import Array
from .coding import (
    AnyCoded,
    Coded,
    Part,
    Tensors,
    check_bits,
    expect,
    from_words,
    grains_of,
    need,
    nibbles,
    stored,
    whole,
)

_FLOATS = {
    np.dtype(jnp.float8_e4m3fn): FP8("e4m3"),
    np.dtype(jnp.float8_e5m2): FP8("e5m2"),
}


def _names(module: str, parameter: str, *ends: str) -> tuple[str, ...]:
    return tuple(f"{module}.{parameter}{end}" for end in ends)


def find_packed(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """4- or 8-bit integers packed in int32 words, with a scale for each group or each output."""
    packed, scale, size, zero, order = _names(
        module, parameter, "_packed", "_scale", "_shape", "_zero_point", "_g_idx"
    )
    if packed not in tensors or tensors.view(packed).dtype != np.int32:
        return None
    words = need(tensors, packed, ndim=2)
    outputs, inputs = (int(n) for n in expect(size, need(tensors, size), (2,)))
    if outputs != words.shape[0] or not 0 < inputs <= 32 * words.shape[1]:
        raise AdapterFileError(f"has `{packed}` {words.shape} for a weight of {outputs, inputs}.")
    bits = check_bits(
        packed, next((b for b in (4, 8) if -(-inputs * b // 32) == words.shape[1]), 0)
    )
    if order in tensors and (tensors.view(order) >= 0).any():
        raise UnsupportedAdapterError(
            f"has `{order}`: the groups of `{packed}` are not neighbors, which is not read."
        )
    scales = _scales(tensors, scale, (outputs, inputs))
    grains = grains_of(scale, (outputs, inputs), scales.shape)
    is_symmetric = zero not in tensors
    unsigned = jnp.uint4 if bits == 4 else np.dtype(np.uint8)
    signed = jnp.int4 if bits == 4 else np.dtype(np.int8)
    flip = np.uint8(0 if not is_symmetric else 8 if bits == 4 else 128)

    def codes(rows: slice) -> Array:
        return from_words(words[rows], bits)[:, :inputs] ^ flip

    parts = {
        "codes": Part(codes, (1, 1), (outputs, inputs), signed if is_symmetric else unsigned),
        "scales": whole(scales, grains),
    }
    names = [packed, scale, size, *([order] if order in tensors else [])]
    if not is_symmetric:
        zeros = need(tensors, zero, ndim=2, dtypes=[np.int32])
        count = scales.shape[1]
        if scales.shape[0] != outputs:
            raise AdapterFileError(f"has `{zero}`, but one scale for all of `{packed}`.")
        expect(zero, zeros, (-(-outputs * bits // 32), count))
        zero_points = from_words(zeros.T, bits)[:, :outputs].T
        parts["zeros"] = whole(np.ascontiguousarray(zero_points), grains, unsigned)
        names.append(zero)
    held = (Int4 if bits == 4 else Int8)(block=None, symmetric=is_symmetric)
    return Coded(tuple(names), held, parts, (outputs, inputs), scales.dtype)


def find_scaled(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """int8 or FP8 codes, with one scale, or a scale for each output, group or block."""
    weight, scale, zero, second = _names(module, parameter, "", "_scale", "_zero_point", "_scale_2")
    if weight not in tensors or scale not in tensors or second in tensors:
        return None
    codes = tensors.view(weight)
    if codes.ndim < 2 or codes.dtype not in [*_FLOATS, np.dtype(np.int8)]:
        return None
    scales = _scales(tensors, scale, codes.shape)
    grains = _cut(grains_of, scale, codes.shape, scales.shape)
    ones = (1,) * codes.ndim
    as_is = stored(codes=(weight, codes), scales=(scale, need(tensors, scale)))
    if codes.dtype != np.int8:
        parts = {"codes": whole(codes, ones), "scales": whole(scales, grains)}
        held = _FLOATS[codes.dtype]
        return Coded((weight, scale), held, parts, codes.shape, scales.dtype, stored=as_is)
    if zero not in tensors:
        parts = {"codes": whole(codes, ones), "scales": whole(scales, grains)}
        return Coded((weight, scale), Int8(), parts, codes.shape, scales.dtype, stored=as_is)
    zeros = need(tensors, zero, dtypes=[np.int8]).reshape(scales.shape)
    unsigned = lambda array: array.view(np.uint8) ^ np.uint8(128)  # noqa: E731
    byte = np.dtype(np.uint8)
    parts = {
        "codes": Part(lambda rows: unsigned(np.array(codes[rows])), ones, codes.shape, byte),
        "scales": whole(scales, grains),
        "zeros": whole(unsigned(np.array(zeros)), grains),
    }
    held = Int8(symmetric=False)
    return Coded((weight, scale, zero), held, parts, codes.shape, scales.dtype)


def find_fp4(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """NVFP4, and MXFP4, whose scales are powers of two and which has no global scale."""
    packed, scale, outer = _names(module, parameter, "_packed", "_scale", "_global_scale")
    if packed not in tensors or tensors.view(packed).dtype != np.uint8:
        return None
    data, scales = need(tensors, packed, ndim=2), need(tensors, scale, ndim=2)
    shape = (data.shape[0], 2 * data.shape[1])
    grains = grains_of(scale, shape, scales.shape)
    parts = {"codes": Part(lambda rows: nibbles(data[rows]), (1, 1), shape, jnp.uint4)}
    if scales.dtype in (np.uint8, np.dtype(jnp.float8_e8m0fnu)):
        parts["scales"] = whole(scales.view(np.uint8), grains)
        held = MXFP4(block=grains[1])
        return Coded((packed, scale), held, parts, shape, np.dtype(jnp.bfloat16))
    if scales.dtype != np.dtype(jnp.float8_e4m3fn):
        raise AdapterFileError(f"has `{scale}` in {scales.dtype}, of which no FP4 format is.")
    number = np.asarray(need(tensors, outer)).astype(np.float32).reshape(-1)
    parts["scales"] = whole(scales, grains)
    parts["outer"] = whole(expect(outer, number, (1,)).reshape(1, 1), shape)
    held = NVFP4(block=grains[1])
    return Coded((packed, scale, outer), held, parts, shape, np.dtype(jnp.bfloat16))


def _scales(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Array:
    """Scales with as many axes as the weight."""
    scales = need(tensors, name)
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise AdapterFileError(f"has `{name}` in {scales.dtype}, not floats.")
    return scales.reshape((1,) * len(shape)) if scales.size == 1 else scales


def _cut(grains: Any, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> Any:
    """The grains of the scales; blocks of 128 × 128 may be cut at the end of an axis."""
    if len(scales) == len(shape) == 2:
        blocks = tuple(-(-size // 128) for size in shape)
        if scales == blocks:
            return (128, 128)
    return grains(name, shape, scales)

"""compressed-tensors: packed integers, integers and FP8 with scales, NVFP4 and MXFP4."""

import jax.numpy as jnp
import numpy as np

from lorax import FP8, MXFP4, Int4, Int8
from lorax.bases import NVFP4

from ..._errors import AdapterFileError
from ..._places import Array
from .coding import (
    EXPONENT,
    UNORDERED,
    AnyCoded,
    Coded,
    Decoded,
    Part,
    Tensors,
    check_bits,
    check_groups,
    expect,
    from_words,
    in_groups,
    need,
    need_scales,
    nibbles,
    stored,
    whole,
)
from .schemes import bits_of, grains_of, is_symmetric_in, schemes_of

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
    schemes = schemes_of(tensors, packed, np.int8)
    bits = check_bits(packed, bits_of(packed, schemes, inputs, words.shape[1]))
    scales = _scales(tensors, scale, (outputs, inputs))
    grains = grains_of(scale, (outputs, inputs), scales.shape, schemes)
    is_symmetric = is_symmetric_in(tensors, zero, schemes)
    unsigned = jnp.uint4 if bits == 4 else np.dtype(np.uint8)
    signed = jnp.int4 if bits == 4 else np.dtype(np.int8)
    flip = np.uint8(0 if not is_symmetric else 8 if bits == 4 else 128)

    def codes(rows: slice) -> Array:
        return from_words(words[rows], bits)[:, :inputs] ^ flip

    parts = {
        "codes": Part(codes, (1, 1), (outputs, inputs), signed if is_symmetric else unsigned),
        "scales": whole(scales, grains),
    }
    names = [packed, scale, size]
    if not is_symmetric:
        parts["zeros"] = whole(_zeros(tensors, zero, scales.shape, outputs, bits), grains, unsigned)
        names.append(zero)
    if order in tensors:
        names.append(order)
        groups = expect(order, need(tensors, order), (inputs,)).astype(np.int64)
        if groups.max() >= 0 and not np.array_equal(groups, np.arange(inputs) // grains[1]):
            check_groups(order, groups, scales.shape[1])
            middle = np.full(scales.shape, 1 << bits - 1, np.uint8)
            zeros = middle.__getitem__ if is_symmetric else parts["zeros"].read
            raw = lambda rows: codes(rows) ^ flip  # noqa: E731
            read = in_groups(raw, zeros, scales.__getitem__, groups)
            return Decoded(tuple(names), UNORDERED, read, (outputs, inputs), scales.dtype)
    codec = (Int4 if bits == 4 else Int8)(block=None, symmetric=is_symmetric)
    return Coded(tuple(names), codec, parts, (outputs, inputs), scales.dtype)


def _zeros(tensors: Tensors, name: str, shape: tuple[int, ...], outputs: int, bits: int) -> Array:
    """The zero points of packed codes, with the shape of their scales, to one byte each."""
    zeros = need(tensors, name, dtypes=[np.int32, np.int8])
    if zeros.dtype == np.int8:  # not packed: one for the whole weight
        numbers = zeros.reshape(shape).astype(np.int16) + (1 << bits - 1)
        if numbers.min() < 0 or numbers.max() >= 1 << bits:
            raise AdapterFileError(f"has `{name}` outside the range of {bits} bits.")
        return numbers.astype(np.uint8)
    if shape[0] != outputs:
        raise AdapterFileError(f"has packed zero points `{name}`, but one scale for many outputs.")
    expect(name, zeros, (-(-outputs * bits // 32), shape[1]))
    return np.ascontiguousarray(from_words(zeros.T, bits)[:, :outputs].T)


def find_scaled(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """int8 or FP8 codes, with one scale, or a scale for each output, group or block."""
    weight, scale, zero, second = _names(module, parameter, "", "_scale", "_zero_point", "_scale_2")
    if weight not in tensors or scale not in tensors or second in tensors:
        return None
    codes = tensors.view(weight)
    if codes.ndim < 2 or codes.dtype not in [*_FLOATS, np.dtype(np.int8)]:
        return None
    scales = _scales(tensors, scale, codes.shape, has_exponents=codes.dtype in _FLOATS)
    schemes = schemes_of(tensors, weight, codes.dtype)
    grains = grains_of(scale, codes.shape, scales.shape, schemes)
    ones = (1,) * codes.ndim
    as_is = stored(codes=(weight, codes), scales=(scale, need(tensors, scale)))
    if codes.dtype != np.int8:
        parts = {"codes": whole(codes, ones), "scales": whole(scales, grains)}
        codec, dtype = _FLOATS[codes.dtype], scales.dtype
        if dtype.itemsize == 1:
            as_is, dtype = {}, np.dtype(jnp.bfloat16)
        return Coded((weight, scale), codec, parts, codes.shape, dtype, stored=as_is)
    if is_symmetric_in(tensors, zero, schemes):
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
    codec = Int8(symmetric=False)
    return Coded((weight, scale, zero), codec, parts, codes.shape, scales.dtype)


def find_fp4(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """NVFP4, and MXFP4, whose scales are powers of two and which has no global scale."""
    packed, scale, outer = _names(module, parameter, "_packed", "_scale", "_global_scale")
    if packed not in tensors or tensors.view(packed).dtype != np.uint8:
        return None
    data, scales = need(tensors, packed, ndim=2), need(tensors, scale, ndim=2)
    shape = (data.shape[0], 2 * data.shape[1])
    grains = grains_of(scale, shape, scales.shape, schemes_of(tensors, packed, np.float32))
    parts = {"codes": Part(lambda rows: nibbles(data[rows]), (1, 1), shape, jnp.uint4)}
    if scales.dtype in (np.uint8, EXPONENT):
        parts["scales"] = whole(scales.view(np.uint8), grains)
        codec = MXFP4(block=grains[1])
        return Coded((packed, scale), codec, parts, shape, np.dtype(jnp.bfloat16))
    if scales.dtype != np.dtype(jnp.float8_e4m3fn):
        raise AdapterFileError(f"has `{scale}` in {scales.dtype}, which no FP4 format uses.")
    number = np.asarray(need_scales(tensors, outer)).astype(np.float32).reshape(-1)
    parts["scales"] = whole(scales, grains)
    parts["outer"] = whole(expect(outer, number, (1,)).reshape(1, 1), shape)
    codec = NVFP4(block=grains[1])
    return Coded((packed, scale, outer), codec, parts, shape, np.dtype(jnp.bfloat16))


def _scales(
    tensors: Tensors, name: str, shape: tuple[int, ...], *, has_exponents: bool = False
) -> Array:
    """Scales with as many axes as the weight; `has_exponents`: bytes are powers of two (MXFP8)."""
    if has_exponents and need(tensors, name).dtype == np.uint8:
        scales = need(tensors, name).view(EXPONENT)
    else:
        scales = need_scales(tensors, name)
    return scales.reshape((1,) * len(shape)) if scales.size == 1 else scales

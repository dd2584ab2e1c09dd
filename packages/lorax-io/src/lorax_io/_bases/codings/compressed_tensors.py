"""compressed-tensors: packed integers, integers and FP8 with scales, NVFP4 and MXFP4."""

from typing import Any

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
from .schemes import Scheme, bits_of, grains_of, is_symmetric_in, schemes_of

_FLOATS = {
    np.dtype(jnp.float8_e4m3fn): FP8("e4m3"),
    np.dtype(jnp.float8_e5m2): FP8("e5m2"),
}
_NVFP4_BLOCK, _MXFP4_BLOCK = 16, 32


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
    sizes = expect(size, need(tensors, size, dtypes=[np.int64, np.int32]), (2,))
    outputs, inputs = (int(n) for n in sizes)
    if outputs != words.shape[0] or not 0 < inputs <= 32 * words.shape[1]:
        raise AdapterFileError(f"has `{packed}` {words.shape} for a weight of {outputs, inputs}.")
    schemes = schemes_of(tensors, module, packed, "int")
    bits = check_bits(packed, bits_of(packed, schemes, inputs, words.shape[1]))
    scales = _scales(tensors, scale, (outputs, inputs))
    grains = grains_of(scale, (outputs, inputs), scales.shape, schemes)
    is_symmetric = is_symmetric_in(tensors, zero, schemes)
    if not is_symmetric and schemes and all(scheme.is_symmetric for scheme in schemes):
        raise AdapterFileError(f"has `{zero}`, and its config says that codes are symmetric.")
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
    groups = _groups(tensors, order, schemes, inputs, grains[1], scales.shape)
    if order in tensors:
        names.append(order)
    if groups is not None:
        middle = np.full(scales.shape, 1 << bits - 1, np.uint8)
        zeros = middle.__getitem__ if is_symmetric else parts["zeros"].read
        raw = lambda rows: codes(rows) ^ flip  # noqa: E731
        read = in_groups(raw, zeros, scales.__getitem__, groups)
        return Decoded(tuple(names), UNORDERED, read, (outputs, inputs), scales.dtype)
    codec = (Int4 if bits == 4 else Int8)(block=None, symmetric=is_symmetric)
    return Coded(tuple(names), codec, parts, (outputs, inputs), scales.dtype)


def _groups(
    tensors: Tensors, name: str, schemes: list[Scheme], inputs: int, size: int, shape: Any
) -> Array | None:
    """The group of each input; None if groups are neighbors.

    Args:
        tensors: the checkpoint.
        name: of the groups.
        schemes: those that the config has for such codes.
        inputs: of the weight.
        size: of a group.
        shape: of the scales.
    """
    if name not in tensors:
        if schemes and all(scheme.has_order for scheme in schemes):
            raise AdapterFileError(f"lacks `{name}`, and its config says that groups have an order "
                                   "of their own (actorder).")  # fmt: skip
        return None
    groups = expect(name, need(tensors, name, dtypes=[np.int32, np.int64]), (inputs,))
    groups = groups.astype(np.int64)
    if groups.max() < 0 or np.array_equal(groups, np.arange(inputs) // size):
        return None
    check_groups(name, groups, shape[1])
    return groups


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
    weight, scale, zero, second, order = _names(
        module, parameter, "", "_scale", "_zero_point", "_scale_2", "_g_idx"
    )
    if weight not in tensors or scale not in tensors or second in tensors:
        return None
    codes = tensors.view(weight)
    if codes.ndim < 2 or codes.dtype not in [*_FLOATS, np.dtype(np.int8)]:
        return None
    scales = _scales(tensors, scale, codes.shape, of_floats=codes.dtype in _FLOATS)
    kind, bits = ("int", None) if codes.dtype == np.int8 else ("float", 8)
    schemes = schemes_of(tensors, module, weight, kind, bits)
    grains = grains_of(scale, codes.shape, scales.shape, schemes)
    ones = (1,) * codes.ndim
    as_is = stored(codes=(weight, codes), scales=(scale, need(tensors, scale)))
    if codes.dtype != np.int8:
        parts = {"codes": whole(codes, ones), "scales": whole(scales, grains)}
        codec, dtype = _FLOATS[codes.dtype], scales.dtype
        if dtype.itemsize == 1:
            as_is, dtype = {}, np.dtype(jnp.bfloat16)
        return Coded((weight, scale), codec, parts, codes.shape, dtype, stored=as_is)
    is_symmetric = is_symmetric_in(tensors, zero, schemes)
    unsigned = lambda array: array.view(np.uint8) ^ np.uint8(128)  # noqa: E731
    raw = Part(lambda rows: unsigned(np.array(codes[rows])), ones, codes.shape, np.dtype(np.uint8))
    zeros = np.zeros(scales.shape, np.int8)
    if not is_symmetric:
        zeros = need(tensors, zero, dtypes=[np.int8]).reshape(scales.shape)
    zeros = unsigned(np.array(zeros))
    names = (weight, scale) if is_symmetric else (weight, scale, zero)
    if order in tensors:
        names = (*names, order)
    if codes.ndim == 2:
        groups = _groups(tensors, order, schemes, codes.shape[1], grains[1], scales.shape)
        if groups is not None:
            read = in_groups(raw.read, zeros.__getitem__, scales.__getitem__, groups)
            return Decoded(names, UNORDERED, read, codes.shape, scales.dtype)
    if is_symmetric:
        parts = {"codes": whole(codes, ones), "scales": whole(scales, grains)}
        return Coded(names, Int8(), parts, codes.shape, scales.dtype, stored=as_is)
    parts = {"codes": raw, "scales": whole(scales, grains), "zeros": whole(zeros, grains)}
    return Coded(names, Int8(symmetric=False), parts, codes.shape, scales.dtype)


def find_fp4(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """NVFP4, and MXFP4, whose scales are powers of two and which has no global scale."""
    packed, scale, outer = _names(module, parameter, "_packed", "_scale", "_global_scale")
    if packed not in tensors or tensors.view(packed).dtype != np.uint8:
        return None
    data, scales = need(tensors, packed, ndim=2), need(tensors, scale, ndim=2)
    shape = (data.shape[0], 2 * data.shape[1])
    has_exponents = scales.dtype in (np.uint8, EXPONENT)
    schemes = schemes_of(tensors, module, packed, "float", 4)
    grains = grains_of(scale, shape, scales.shape, schemes)
    block = _MXFP4_BLOCK if has_exponents else _NVFP4_BLOCK
    if not schemes and grains != (1, block):  # codes of 6 bits would have other shapes
        raise AdapterFileError(
            f"has `{scale}` of shape {scales.shape}; FP4 of shape {shape} has blocks of {block}. "
            "Pass the folder that has its config.json instead of the file."
        )
    parts = {"codes": Part(lambda rows: nibbles(data[rows]), (1, 1), shape, jnp.uint4)}
    if has_exponents:
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
    tensors: Tensors, name: str, shape: tuple[int, ...], *, of_floats: bool = False
) -> Array:
    """Scales with as many axes as the weight."""
    scales = need_scales(tensors, name, of_floats=of_floats)
    return scales.reshape((1,) * len(shape)) if scales.size == 1 else scales

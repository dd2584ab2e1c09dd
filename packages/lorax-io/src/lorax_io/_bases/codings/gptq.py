"""GPTQ and AWQ: integers packed in int32 words, with a scale and a zero point for each group."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import Int4, Int8

from ..._errors import AdapterFileError, UnsupportedAdapterError
from ..._places import Array
from .coding import (
    AnyCoded,
    Coded,
    Decoded,
    Part,
    Tensors,
    check_bits,
    expect,
    from_words,
    need,
    setting,
)

# AWQ interleaves the eight outputs in a word: this undoes it.
_ORDER = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def find(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """A weight of GPTQ, packed along the inputs, or of AWQ (GEMM), packed along the outputs."""
    prefix = f"{module}." if parameter == "weight" else f"{module}.{parameter}_"
    if f"{prefix}qweight" not in tensors or f"{prefix}scales" not in tensors:
        return None
    words = need(tensors, f"{prefix}qweight", ndim=2, dtypes=[np.int32])
    scales = need(tensors, f"{prefix}scales", ndim=2)
    zeros = need(tensors, f"{prefix}qzeros", ndim=2, dtypes=[np.int32])
    kind = _method(tensors, prefix)
    groups, outputs = scales.shape
    if groups < 1 or outputs < 1 or zeros.shape[0] != groups:
        raise AdapterFileError(f"has `{prefix}scales` {scales.shape} and zeros {zeros.shape}.")
    names = tuple(f"{prefix}{end}" for end in ("qweight", "scales", "qzeros"))
    bits = check_bits(names[0], 32 * zeros.shape[1] / outputs)
    if setting(tensors, "bits", bits) != bits and not setting(tensors, "dynamic"):
        raise AdapterFileError(
            f"has `{names[0]}` in {bits} bits, and its config says {setting(tensors, 'bits')!r}."
        )
    is_awq = kind == "awq" or (words.shape[1] != outputs and kind != "gptq")
    inputs = words.shape[0] if is_awq else words.shape[0] * 32 // bits
    if inputs % groups:
        raise AdapterFileError(f"has {groups} groups for the {inputs} inputs of `{module}`.")
    group = inputs // groups
    if is_awq:
        if str(setting(tensors, "version", "gemm")).lower() != "gemm" or bits != 4:
            raise UnsupportedAdapterError(
                "is of another version of AWQ than GEMM of 4 bits, which is the one that is read."
            )
        expect(names[0], words, (inputs, outputs // 8))
    else:
        expect(names[0], words, (inputs * bits // 32, outputs))

    def codes(rows: slice) -> Array:  # [outputs, inputs]
        if is_awq:
            return _of_awq(words, rows)
        return from_words(words[:, rows].T, bits)

    def zero_points(rows: slice) -> Array:  # [outputs, groups]
        if is_awq:
            return _of_awq(zeros, rows)
        stored = from_words(zeros, bits)[:, rows].T
        if setting(tensors, "checkpoint_format") == "gptq_v2":
            return stored
        return (stored + 1) & (2**bits - 1)  # GPTQ's v1 files store the zero point minus one

    dtype = jnp.uint4 if bits == 4 else np.dtype(np.uint8)
    codec = (Int4 if bits == 4 else Int8)(block=group, symmetric=False)
    shape = (outputs, inputs)
    parts = {
        "codes": Part(codes, (1, 1), shape, dtype),
        "scales": Part(lambda rows: scales[:, rows].T, (1, group), (outputs, groups), scales.dtype),
        "zeros": Part(zero_points, (1, group), (outputs, groups), dtype),
    }
    order = f"{prefix}g_idx"
    if order not in tensors:
        return Coded(names, codec, parts, shape, scales.dtype)
    names = (*names, order)
    of = expect(order, need(tensors, order), (inputs,)).astype(np.int64)
    if np.array_equal(of, np.arange(inputs) // group) or not of.any():
        return Coded(names, codec, parts, shape, scales.dtype)
    if of.min() < 0 or of.max() >= groups:
        raise AdapterFileError(f"has a group in `{order}` that has no scale.")

    def decoded() -> Array:
        every = slice(0, outputs)
        zero, scale = zero_points(every)[:, of].astype(np.int16), scales.T[:, of]
        return (codes(every) - zero).astype(scales.dtype) * scale

    why = "its groups are not neighbors (desc_act)"
    return Decoded(names, why, decoded, shape, scales.dtype)


def _method(tensors: Tensors, prefix: str) -> str:
    """The library that wrote the weight, or "" if the config does not say."""
    method = str(setting(tensors, "quant_method", ""))
    if method not in ("", "gptq", "awq"):
        raise UnsupportedAdapterError(
            f"has `{prefix}qweight` of {method}, whose zero points may be stored in another way "
            "than those of GPTQ and AWQ, which are read."
        )
    form = setting(tensors, "checkpoint_format", "gptq")
    if method != "awq" and form not in ("gptq", "gptq_v2"):
        raise UnsupportedAdapterError(
            f"has `{prefix}qweight` in the format {form!r}; gptq and gptq_v2 are read."
        )
    return method


def _of_awq(words: Any, rows: slice) -> Array:
    """Some rows of AWQ's codes, which are packed along the outputs, eight to a word."""
    first, last = rows.start // 8, -(-rows.stop // 8)
    codes = from_words(words[:, first:last], 4)
    codes = codes.reshape(*codes.shape[:1], -1, 8)[..., _ORDER].reshape(codes.shape[0], -1)
    return codes[:, rows.start - 8 * first : rows.stop - 8 * first].T

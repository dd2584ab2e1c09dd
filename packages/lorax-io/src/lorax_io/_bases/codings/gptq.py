"""GPTQ and AWQ: integers packed in int32 words, with a scale and a zero point for each group."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import Int4, Int8

from ..._errors import AdapterFileError, UnsupportedAdapterError
from ..._places import Array
from .coding import (
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
    scales = need_scales(tensors, f"{prefix}scales", ndim=2)
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
    order, of = f"{prefix}g_idx", None
    if order in tensors:
        names = (*names, order)
        of = expect(order, need(tensors, order), (inputs,)).astype(np.int64)
        check_groups(order, of, groups)
    elif setting(tensors, "desc_act") is True and groups > 1:
        raise AdapterFileError(f"lacks `{order}`, and its config says desc_act.")
    group = _group(tensors, names[0], inputs, groups, of)
    if is_awq:
        version = setting(tensors, "version", _form(tensors) if kind == "awq" else None)
        if str(version or "gemm").lower() != "gemm" or bits != 4:
            raise UnsupportedAdapterError(
                "uses a version of AWQ other than 4-bit GEMM, which is the only one that is read."
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
        if _form(tensors) == "gptq_v2":
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
    neighbors = np.arange(inputs) // group
    if of is None or np.array_equal(of, neighbors):
        return Coded(names, codec, parts, shape, scales.dtype)
    if not of.any():
        assumed = (
            f"all of `{order}` is 0, which is read as {groups} groups of neighbors, as exllama's "
            "kernels do"
        )
        return Coded(names, codec, parts, shape, scales.dtype, assumed=assumed)
    read = in_groups(codes, zero_points, lambda rows: scales[:, rows].T, of)
    return Decoded(names, UNORDERED, read, shape, scales.dtype)


def _group(tensors: Tensors, name: str, inputs: int, groups: int, of: Array | None) -> int:
    """How many neighbors share a scale; the last group may be cut.

    Args:
        tensors: the checkpoint, whose config says the size of groups.
        name: of the codes.
        inputs: of the weight.
        groups: how many scales each output has.
        of: the group of each input, if the file has them.
    """
    said = setting(tensors, "group_size", setting(tensors, "q_group_size"))  # AutoAWQ's own name
    said = inputs if said == -1 else said
    if type(said) is int and said > 0:
        if -(-inputs // said) == groups:
            return said
        if not setting(tensors, "dynamic"):
            raise AdapterFileError(
                f"has `{name}` in {groups} groups of its {inputs} inputs, and its config says "
                f"groups of {said}."
            )
    even = -(-inputs // groups)
    if of is not None and of.any():
        first = int(np.argmax(of != of[0]))
        return first if first and -(-inputs // first) == groups else even
    if even * groups == inputs and (groups == 1 or even & (even - 1) == 0):
        return even
    raise AdapterFileError(
        f"has `{name}` in {groups} groups of its {inputs} inputs, and no config says the size of "
        "a group. Pass the folder that has its config.json instead of the file."
    )


def _method(tensors: Tensors, prefix: str) -> str:
    """The library that wrote the weight, or "" if the config does not say."""
    method = str(setting(tensors, "quant_method") or setting(tensors, "method") or "")
    if method not in ("", "gptq", "awq"):
        raise UnsupportedAdapterError(
            f"has `{prefix}qweight` of {method}, whose zero points may be stored in another way "
            "than those of GPTQ and AWQ, which are read."
        )
    form = "marlin" if setting(tensors, "is_marlin_format") else _form(tensors) or "gptq"
    if method != "awq" and form not in ("gptq", "gptq_v2"):
        raise UnsupportedAdapterError(
            f"has `{prefix}qweight` in the format {form!r}; gptq and gptq_v2 are read."
        )
    return method


def _form(tensors: Tensors) -> Any:
    """The form of the file, by the keys of AutoGPTQ and of GPTQModel; None if they are absent."""
    return setting(tensors, "checkpoint_format") or setting(tensors, "format")


def _of_awq(words: Any, rows: slice) -> Array:
    """Some rows of AWQ's codes, which are packed along the outputs, eight to a word."""
    first, last = rows.start // 8, -(-rows.stop // 8)
    codes = from_words(words[:, first:last], 4)
    codes = codes.reshape(*codes.shape[:1], -1, 8)[..., _ORDER].reshape(codes.shape[0], -1)
    return codes[:, rows.start - 8 * first : rows.stop - 8 * first].T

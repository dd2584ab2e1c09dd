"""bitsandbytes: NF4, with or without double quantization of its scales, and LLM.int8.

NF4's blocks run over the flattened weight. If they do not divide its rows, the runs of entries
within a row that share a scale are shorter than a block, and so are the blocks in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import NF4
from lorax.bases import LLMInt8
from lorax.bases.nf4 import QUANTILES

from ..._disk.tensors import parse_json
from ..._errors import AdapterFileError
from ..._places import Array
from .coding import (
    AnyCoded,
    Coded,
    Decoded,
    Part,
    Tensors,
    expect,
    need,
    need_scales,
    nibbles,
    whole,
)

SHORTEST = 8  # entries in a run: below this, float32 scales would take more memory than the codes
_STORAGE = (np.uint8, np.float16, jnp.bfloat16, np.float32, np.float64)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def find_4bit(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """A weight in NF4 or FP4."""
    weight = f"{module}.{parameter}"
    state = f"{weight}.quant_state.bitsandbytes__"
    kind = next((kind for kind in ("nf4", "fp4") if f"{state}{kind}" in tensors), None)
    if kind is None:
        return None
    shape, block, dtype, settings = _state(tensors, f"{state}{kind}")
    size = math.prod(shape)
    # The bytes may be stored as numbers of another dtype (`bnb_4bit_quant_storage`).
    stored = need(tensors, weight, dtypes=_STORAGE)
    data = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    expect(weight, data, ((size + 1) // 2,))
    codes_of = f"{weight}.quant_map"
    table = expect(codes_of, need_scales(tensors, codes_of), (16,)).astype(np.float32)
    scales, names = _scales(tensors, weight, settings, -(-size // block))
    names = (weight, f"{state}{kind}", codes_of, *names)
    width, inputs = math.prod(shape[1:]), shape[-1]

    def codes(rows: Any) -> Array:
        begin, end = rows.start * width, rows.stop * width
        entries = nibbles(data[begin // 2 : -(-end // 2)], high_first=True)
        return entries[begin % 2 : begin % 2 + end - begin].reshape(-1, *shape[1:])

    run = math.gcd(inputs, block)
    is_known = np.array_equal(table, np.asarray(QUANTILES, np.float32))
    if is_known and run >= SHORTEST:
        count = inputs // run

        def scale(rows: Any) -> Array:
            starts = np.arange(rows.start * (width // run), rows.stop * (width // run)) * run
            return scales(starts // block).reshape(-1, *shape[1:-1], count)

        ones = (1,) * (len(shape) - 1)
        parts = {
            "codes": Part(codes, (*ones, 1), shape, jnp.uint4),
            "scales": Part(scale, (*ones, run), (*shape[:-1], count), np.dtype(np.float32)),
        }
        codec = NF4(block=min(max(block, 32), 4096), double=False)
        return Coded(names, codec, parts, shape, dtype, run < block)

    def decoded(rows: slice) -> Array:
        entries = codes(rows)
        each = scales(np.arange(rows.start * width, rows.stop * width) // block)
        return (table[entries] * each.reshape(entries.shape)).astype(dtype)

    why = f"blocks of {block} cross the rows of {inputs}" if is_known else f"a table of {kind}"
    return Decoded(names, why, decoded, shape, dtype)


def _state(tensors: Tensors, name: str) -> tuple[tuple[int, ...], int, Any, dict[str, Any]]:
    """The shape, block size and dtype of a weight, and all of its settings."""
    try:
        text = need(tensors, name, dtypes=[np.uint8]).tobytes().decode()
        settings = parse_json(text)
        shape, block, dtype = settings["shape"], settings["blocksize"], _DTYPES[settings["dtype"]]
        if all(type(n) is int and 0 < n < 2**40 for n in [block, *shape]) and len(shape) > 1:
            return tuple(shape), block, np.dtype(dtype), settings
    except (UnicodeError, KeyError, TypeError, AdapterFileError) as error:
        raise AdapterFileError(f"its `{name}` is not the state of a weight.") from error
    raise AdapterFileError(f"its `{name}` is not the state of a weight.")


def _scales(
    tensors: Tensors, weight: str, state: dict[str, Any], count: int
) -> tuple[Callable[[Array], Array], tuple[str, ...]]:
    """A function from indices of blocks to their float32 scales, and the tensors it reads.

    8-bit scales (double quantization) are decoded as in bitsandbytes.
    """
    name = f"{weight}.absmax"
    scales = expect(name, need(tensors, name), (count,))
    if scales.dtype != np.uint8:
        need_scales(tensors, name)
        return lambda blocks: scales[blocks].astype(np.float32, copy=False), (name,)
    outer, table = f"{weight}.nested_absmax", f"{weight}.nested_quant_map"
    values = expect(table, need_scales(tensors, table), (256,)).astype(np.float32)
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float):
        raise AdapterFileError(f"the state of `{weight}` has no nested blocks.")
    each = expect(outer, need_scales(tensors, outer), (-(-count // block),)).astype(np.float32)
    number = np.float32(offset)
    decode = lambda blocks: values[scales[blocks]] * each[blocks // block] + number  # noqa: E731
    return decode, (name, outer, table)


def find_8bit(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """A weight in LLM.int8: int8 codes, and a scale for each output (`SCB`)."""
    scale, weight = f"{module}.SCB", f"{module}.{parameter}"
    if parameter != "weight" or scale not in tensors:
        return None
    codes = need(tensors, weight, ndim=2, dtypes=[np.int8])
    scales = need_scales(tensors, scale, ndim=1)[:, None]
    expect(scale, scales, (codes.shape[0], 1))
    parts = {"codes": whole(codes, (1, 1)), "scales": whole(scales, (1, codes.shape[1]))}
    names = [weight, scale]
    order = f"{module}.weight_format"
    if order in tensors:
        if tensors.view(order).any():
            raise AdapterFileError(
                f"has `{weight}` in the order of a GPU kernel. Save it in row order."
            )
        names.append(order)
    return Coded(tuple(names), LLMInt8(), parts, codes.shape)

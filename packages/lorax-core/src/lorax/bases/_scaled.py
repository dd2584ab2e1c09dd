"""Formats whose codes are numbers: an entry is a code times the scale of its block."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._contract import wide_dtype

INTEGERS: dict[int, tuple[Any, Any]] = {4: (jnp.int4, jnp.uint4), 8: (jnp.int8, jnp.uint8)}
"""The signed and the unsigned dtype, by the bits of a code."""


def largest(entries: jax.Array, within: Sequence[int]) -> jax.Array:
    """Returns the largest magnitude of each block, or 1 for a block of zeros."""
    largest_entry = jnp.max(jnp.abs(entries), tuple(within), keepdims=True)
    return jnp.where(largest_entry == 0, jnp.ones_like(largest_entry), largest_entry)


def to_scale(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the scale of an entry, which may be stored as a code itself."""
    # The scale itself, or its code times the outer scale.
    scale, outer = arrays["scales"], arrays.get("outer")
    if outer is None:
        return scale.astype(wide_dtype(scale.dtype))
    # Products of scales in float32 or wider: a bfloat16 product would round every entry.
    dtype = wide_dtype(outer.dtype)
    return scale.astype(dtype) * outer.astype(dtype)


def with_scales_of_scales(
    scale: jax.Array, across: Sequence[int]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns 8-bit scales with one outer scale per output, and the scales these represent."""
    # The largest scale is code 255. No code is 0: a scale of zero would zero its whole block.
    outer = jnp.max(scale, tuple(across), keepdims=True) / 255
    codes = jnp.clip(jnp.round(scale / outer), 1, 255).astype(jnp.uint8)
    return {"scales": codes, "outer": outer}, codes.astype(outer.dtype) * outer


def integers(
    entries: jax.Array, within: Sequence[int], bits: int, symmetric: bool, dtypes: Any
) -> dict[str, jax.Array]:
    """Returns codes of `bits` bits, rounded to nearest; if not symmetric, with a zero point."""
    signed, unsigned = dtypes
    if symmetric:
        # Codes −7 … 7 of 4 bits: −8 would have no counterpart, and zero stays exactly zero.
        top = 2 ** (bits - 1) - 1
        scale = largest(entries, within) / top
        codes = jnp.clip(jnp.round(entries / scale), -top, top).astype(signed)
        return {"codes": codes, "scales": scale}
    top = 2**bits - 1
    zero = jnp.zeros((), entries.dtype)
    # The range of a block always holds zero, so that a code represents it exactly.
    low = jnp.minimum(jnp.min(entries, tuple(within), keepdims=True), zero)
    high = jnp.maximum(jnp.max(entries, tuple(within), keepdims=True), zero)
    scale = jnp.where(high == low, jnp.ones_like(high), (high - low) / top)
    # entry = (code − zeros) · scale
    zeros = jnp.clip(jnp.round(-low / scale), 0, top)
    codes = jnp.clip(jnp.round(entries / scale) + zeros, 0, top).astype(unsigned)
    return {"codes": codes, "scales": scale, "zeros": zeros.astype(unsigned)}


def times_scale(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Returns `(code − zero) · scale`."""
    scale = to_scale(arrays)
    entries = arrays["codes"].astype(scale.dtype)
    if "zeros" in arrays:
        entries = entries - arrays["zeros"].astype(scale.dtype)
    return entries * scale

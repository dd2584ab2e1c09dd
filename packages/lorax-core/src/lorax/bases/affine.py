"""Affine codes: a scale and a minimum per block, both of which may be codes themselves."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._contract import wide_dtype
from .._errors import SpecError
from . import _scaled
from .int8 import check_block

TOP = 63  # scales and minimums of the blocks of a group have 6 bits


@defformat
class Affine(Format):
    """Integers times a scale, above a minimum: Q4_1, Q4_K and related types of GGUF files.

        W[in, out]  =  codes[in, out] · scales[block, out] + mins[block, out]

    With groups of blocks, `scales` and `mins` are integers, and a group has one number for each:

        W  =  codes · scales[block] · outer[group] + mins[block] · outer_mins[group]

    Args:
        block: how many entries along the inputs share a scale and a minimum.
        group: how many blocks share an outer scale and an outer minimum; None if scales are floats.
        bits: the bits of a code: 4, or 8 for codes of 5 to 8 bits.
        minimum: whether there are minimums. Without them, codes are signed.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import quantize
        >>> from lorax.bases import Affine
        >>> weight = quantize({"w": jnp.ones((512, 3))}, {"w": Affine(group=8)})["w"]
        >>> weight.arrays["codes"].shape, weight.arrays["outer"].shape, weight.bits
        ((2, 8, 32, 3), (2, 3), 4.75)
    """

    name = "affine"

    block: int = 32
    group: int | None = None
    bits: int = 4
    minimum: bool = True
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid sizes."""
        check_block(self.block)
        check_block(self.group)
        if self.bits not in (4, 8):
            raise SpecError(f"Affine has bits={self.bits!r}; it must be 4 or 8.")

    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of the codes."""
        signed, unsigned = _scaled.INTEGERS[self.bits]
        return (unsigned,) if self.minimum else (signed,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest code between the smallest and the largest entry of a block."""
        dtype = self.dtypes()[0]
        low, top = jnp.zeros((), entries.dtype), jnp.iinfo(dtype).max
        if self.minimum:
            low = jnp.minimum(jnp.min(entries, tuple(within), keepdims=True), 0)
        high = jnp.max(entries if self.minimum else jnp.abs(entries), tuple(within), keepdims=True)
        arrays = {"scales": _or_one((high - low) / top)}
        if self.minimum:
            arrays["mins"] = low
        if self.group is not None:
            arrays = _grouped(arrays, across)
        # entry = code · scale + minimum, with the scale and the minimum as they will be decoded, so
        # that the codes make up for their rounding.
        scale = _scaled.to_scale(arrays)
        codes = jnp.round((entries - _minimum(arrays, scale.dtype)) / _or_one(scale))
        return {"codes": jnp.clip(codes, 0 if self.minimum else -top, top).astype(dtype), **arrays}

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns codes times scales, plus minimums."""
        entries = _scaled.times_scale(arrays)
        return entries + _minimum(arrays, entries.dtype) if "mins" in arrays else entries


def _or_one(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _minimum(arrays: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """Returns the minimum of an entry's block, which may be stored as a code itself."""
    if "mins" not in arrays:
        return jnp.zeros((), dtype)
    minimum, outer = arrays["mins"].astype(dtype), arrays.get("outer_mins")
    return minimum if outer is None else minimum * outer.astype(dtype)


def _grouped(arrays: Mapping[str, jax.Array], across: Sequence[int]) -> dict[str, jax.Array]:
    """Returns 6-bit scales and minimums, with one outer number per group for each."""
    grouped: dict[str, jax.Array] = {}
    for name, outer in (("scales", "outer"), ("mins", "outer_mins")):
        if name in arrays:
            sign = -1 if name == "mins" else 1  # minimums are at most zero
            # scale = code of 6 bits · outer, one outer number for each group
            most = jnp.max(jnp.abs(arrays[name]), tuple(across), keepdims=True)
            unit = _or_one(most.astype(wide_dtype(most.dtype)) / TOP)
            grouped[name] = jnp.round(jnp.abs(arrays[name]) / unit).astype(jnp.uint8)
            grouped[outer] = sign * unit
    return grouped

"""NVFP4: 4-bit floats, an 8-bit float per block of 16, and one number per output."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from . import _scaled, _table
from .int8 import check_block
from .mxfp4 import TABLE, VALUES


@defformat
class NVFP4(Format):
    """Floats of four bits times an E4M3 float, divided by one number for each output.

        W[in, out]  =  E2M1(codes[in, out]) · (scales[in / 16, out] / outer[out])

    `outer` maps the largest scale to the top of E4M3's range. Files of compressed-tensors and
    ModelOpt have one such number for the whole weight, which is repeated here for each output.

    Args:
        block: how many entries along the inputs share a scale; 16 in NVIDIA's format.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import quantize
        >>> weight = quantize({"w": jnp.full((512, 3), 1.5)}, {"w": "nvfp4"})["w"]
        >>> weight.bits, weight.array()[0].tolist()
        (4.5625, [1.5, 1.5, 1.5])
    """

    name = "nvfp4"

    block: int = 16
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        check_block(self.block)

    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes of codes and scales."""
        return jnp.uint4, jnp.float8_e4m3fn

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest 4-bit float, with a scale that maps the largest entry to 6."""
        largest = _scaled.largest(entries, within) / VALUES[-1]
        highest = float(jnp.finfo(jnp.float8_e4m3fn).max)
        # The largest scale of an output maps to the largest E4M3 float, 448.
        outer = highest / jnp.max(largest, tuple(across), keepdims=True)
        # A scale that E4M3 rounds to zero would zero its whole block.
        lowest = float(jnp.finfo(jnp.float8_e4m3fn).smallest_subnormal)
        scales = jnp.clip(largest * outer, lowest, highest).astype(jnp.float8_e4m3fn)
        # entry = code · scale / outer
        normal = entries * outer / scales.astype(entries.dtype)
        codes = _table.nearest(jnp.abs(normal), VALUES) + 8 * (normal < 0).astype(jnp.uint8)
        return {"codes": codes.astype(jnp.uint4), "scales": scales, "outer": outer}

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns floats times scales."""
        outer = arrays["outer"]
        scale = arrays["scales"].astype(outer.dtype) / outer
        return _table.read(arrays["codes"], TABLE, scale.dtype) * scale

    def are_numbers(self, name: str, array: Any) -> bool:
        """Whether an array represents finite numbers, and no divisor is zero."""
        return super().are_numbers(name, array) and (name != "outer" or bool((array != 0).all()))

"""MXFP4: 4-bit floats, with a power of two per block of 32."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._errors import SpecError
from . import _scaled, _table
from ._entrywise import entrywise

# E2M1, by its bits: sign, two of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = (*VALUES, *(-value for value in VALUES))

BIAS = 127


@defformat
class MXFP4(Format):
    """Floats of four bits times a power of two (OCP Microscaling Formats, version 1.0).

        W[in, out]  =  E2M1(codes[in, out]) · 2 ^ (scales[in / 32, out] − 127)

    Args:
        block: how many entries along the inputs share a power of two; 32 in the standard.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import MXFP4, quantize
        >>> weight = quantize({"w": jnp.full((64, 3), 1.5)}, {"w": MXFP4()})["w"]
        >>> weight.bits, weight.array()[0].tolist()
        (4.25, [1.5, 1.5, 1.5])
    """

    name = "mxfp4"

    block: int = 32
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        if self.block < 1:
            raise SpecError(f"MXFP4 has block={self.block!r}; it must be a positive int.")

    def are_numbers(self, name: str, array: Any) -> bool:
        """Whether no scale is 255, which means NaN."""
        return super().are_numbers(name, array) and (name != "scales" or not (array == 255).any())

    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of the codes."""
        return (jnp.uint4,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to 4-bit floats, with the power that brings the largest entry below 8."""
        # frexp: largest = m · 2^e with m in [0.5, 1), and 4 is the largest power of two in E2M1.
        _, exponent = jnp.frexp(_scaled.largest(entries, within))
        power = jnp.clip(exponent - 1 - 2, -BIAS, BIAS)
        normal = entries / jnp.exp2(power.astype(entries.dtype))
        position = _table.nearest(jnp.abs(normal), VALUES)
        # Bit 3 is the sign: the second half of TABLE has the negative values.
        codes = position + 8 * (normal < 0).astype(jnp.uint8)
        return {
            "codes": codes.astype(jnp.uint4), "scales": (power + BIAS).astype(jnp.uint8)
        }  # fmt: skip

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns floats times powers of two."""
        scale = _power(arrays["scales"], dtype=jnp.dtype(jnp.float32))
        return _table.read(arrays["codes"], TABLE, jnp.float32) * scale


def _power_of_two(codes: jax.Array, *, dtype: Any) -> jax.Array:
    """Returns `2 ^ (codes − 127)` in float32, made from its bits; NaN for 255."""
    bits = codes.astype(jnp.uint32)
    # A float32 with exponent field `bits` and a mantissa of zero is 2^(bits − 127). For bits = 0,
    # that is the subnormal number whose highest mantissa bit is set.
    power = jnp.where(bits == 0, jnp.uint32(1 << 22), bits << 23)
    power = jnp.where(bits == 255, jnp.uint32(0x7FC00000), power)
    return jax.lax.bitcast_convert_type(power, dtype)


_power = entrywise("power_of_two", _power_of_two)

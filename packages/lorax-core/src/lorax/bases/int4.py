"""Int4: 4-bit integers, with one scale per block."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from . import _scaled
from .int8 import check_block


@defformat
class Int4(Format):
    """Integers of 4 bits times a scale, two to a byte.

        W[in, out]  =  codes[in, out] · scales[in / block, out]

    Args:
        block: how many entries along the inputs share a scale; None: all of them.
        symmetric: whether the codes are −7 … 7. Otherwise they are 0 … 15 around a zero point of
            their block, `W = (codes − zeros) · scales`.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import Int4, quantize
        >>> quantize({"w": jnp.ones((64, 3))}, {"w": Int4(32)})["w"].arrays["codes"].shape
        (2, 32, 3)
    """

    name = "int4"

    block: int | None = 32
    symmetric: bool = True
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        check_block(self.block)

    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes of the codes."""
        return (jnp.int4,) if self.symmetric else (jnp.uint4,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest code."""
        return _scaled.integers(entries, within, 4, self.symmetric, (jnp.int4, jnp.uint4))

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Codes times scales."""
        return _scaled.times_scale(arrays)

"""Int8: 8-bit integers, with one scale per output or per block."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._errors import SpecError
from . import _scaled


@defformat
class Int8(Format):
    """Integers of 8 bits times a scale.

        W[in, out]  =  codes[in, out] · scales[out]

    Args:
        block: how many entries along the inputs share a scale; None: all of them.
        symmetric: whether the codes are −127 … 127. Otherwise they are 0 … 255 around a zero
            point of their block, `W = (codes − zeros) · scales`.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import Int8, quantize
        >>> quantize({"w": jnp.ones((64, 3))}, {"w": Int8()})["w"].arrays["scales"].shape
        (3,)
    """

    name = "int8"

    block: int | None = None
    symmetric: bool = True
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        check_block(self.block)

    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes of the codes."""
        return (jnp.int8,) if self.symmetric else (jnp.uint8,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest code."""
        return _scaled.integers(entries, within, 8, self.symmetric, (jnp.int8, jnp.uint8))

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Codes times scales."""
        return _scaled.times_scale(arrays)


def check_block(block: Any) -> None:
    """Raises `SpecError` for an invalid block size."""
    if block is not None and block < 1:
        raise SpecError(f"block={block!r}; it must be a positive int, or None.")

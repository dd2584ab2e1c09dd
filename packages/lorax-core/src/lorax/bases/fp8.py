"""FP8: 8-bit floats, with one scale per output or per block."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._errors import SpecError
from . import _scaled
from .int8 import check_block

KINDS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@defformat
class FP8(Format):
    """Floats of 8 bits times a scale.

        W[in, out]  =  codes[in, out] · scales[out]

    Args:
        kind: "e4m3" with 3 bits of mantissa, or "e5m2" with 2 and a wider range.
        block: how many entries along the inputs share a scale; None: all of them.
        square: whether the blocks run along the outputs as well, as the 128 × 128 of DeepSeek-V3.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import FP8, quantize
        >>> weight = quantize({"w": jnp.ones((256, 384))}, {"w": FP8(block=128, square=True)})["w"]
        >>> weight.arrays["codes"].shape, weight.arrays["scales"].shape
        ((2, 128, 3, 128), (2, 3))
    """

    name = "fp8"

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    block: int | None = None
    square: bool = False
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        check_block(self.block)
        if self.square and self.block is None:
            raise SpecError("FP8 has square=True and no block, which is the side of a square.")

    def blocks(
        self, path: str, shape: tuple[int, ...], along: tuple[int, ...]
    ) -> dict[int, tuple[int, ...]]:
        """Returns blocks along the inputs and, if square, also along the last output."""
        blocks = super().blocks(path, shape, along)
        if not self.square or self.block is None:
            return blocks
        # A square block is [block, block]: along the inputs, and along the last axis of the
        # outputs.
        others = [d for d in range(len(shape)) if d not in along]
        return blocks | super().blocks(path, shape, tuple(others[-1:]))

    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of the codes."""
        return (KINDS[self.kind],)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest 8-bit float."""
        dtype = KINDS[self.kind]
        top = float(jnp.finfo(dtype).max)
        # The largest entry of a block maps to the largest 8-bit float.
        scale = _scaled.largest(entries, within) / top
        return {"codes": jnp.clip(entries / scale, -top, top).astype(dtype), "scales": scale}

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Codes times scales."""
        return _scaled.times_scale(arrays)

"""LLM.int8: 8-bit integers, with the largest magnitude of each output as its scale."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._contract import wide_dtype
from . import _scaled

STEP = 7.874015718698502e-3  # bitsandbytes' 1 / 127


@defformat
class LLMInt8(Format):
    """Integers of 8 bits times the largest magnitude of their output, over 127 (arXiv:2208.07339).

        W[in, out]  =  codes[in, out] · scales[out] / 127

    `Int8` differs from this in the last bit only, because bitsandbytes multiplies twice.

    Args:
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import quantize
        >>> weight = quantize({"w": jnp.full((64, 3), 2.0)}, {"w": "llm_int8"})["w"]
        >>> weight.arrays["scales"].tolist()
        [2.0, 2.0, 2.0]
    """

    name = "llm_int8"

    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of the codes."""
        return (jnp.int8,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Rounds to the nearest code."""
        scale = _scaled.largest(entries, within)
        codes = jnp.clip(jnp.round(entries / scale * 127), -127, 127)
        return {"codes": codes.astype(jnp.int8), "scales": scale}

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns codes times magnitudes, times the step between codes."""
        # In this order and with this constant, the floats are bit for bit those of bitsandbytes.
        scale = arrays["scales"].astype(wide_dtype(arrays["scales"].dtype))
        return (arrays["codes"].astype(scale.dtype) * scale) * STEP

"""NF4: 4-bit codes that represent quantiles of a normal distribution, with a scale per block."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._base_format import Format, defformat
from .._errors import SpecError
from . import _scaled, _table

# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

SMALLEST, LARGEST = 32, 4096


@defformat
class NF4(Format):
    """Quantiles of a normal distribution times a scale (QLoRA, Dettmers et al. 2023).

        W[in, out]  =  quantile[codes[in, out]] · scales[in / block, out]

    Args:
        block: how many entries along the inputs share a scale, 32 to 4096.
        double: whether the scales are 8-bit codes, times one number per output: about 4.13 bits per
            entry instead of 4.5, for blocks of 64.
        along: the axes whose entries share scales; None: as `quantize` finds them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import NF4, quantize
        >>> weight = quantize({"w": jnp.ones((4096, 512), jnp.bfloat16)}, {"w": NF4()})["w"]
        >>> round(weight.bits, 2), weight.arrays["scales"].dtype.name, weight.arrays["outer"].shape
        (4.13, 'uint8', (512,))
    """

    name = "nf4"

    block: int = 64
    double: bool = True
    along: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""
        if not SMALLEST <= self.block <= LARGEST:
            raise SpecError(
                f"NF4 has block={self.block!r}; it must be from {SMALLEST} to {LARGEST}."
            )

    def dtypes(self) -> tuple[Any, ...]:
        """The dtype of the codes."""
        return (jnp.uint4,)

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Returns the nearest quantile of each entry."""
        scale = _scaled.largest(entries, within)
        arrays = {"scales": scale}
        if self.double:
            # Codes are chosen for the rounded scales, as they will be decoded.
            arrays, scale = _scaled.with_scales_of_scales(scale, across)
        codes = _table.nearest(entries / scale, QUANTILES).astype(jnp.uint4)
        return {"codes": codes, **arrays}

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns quantiles times scales."""
        scale = _scaled.to_scale(arrays)
        return _table.read(arrays["codes"], QUANTILES, scale.dtype) * scale

"""GraLoRA: a grid of small LoRAs, one per pair of an input block and an output block.

ΔW[shared, (n i), (m o)]  =  scale · Σ_ρ a[n, i, m, ρ] b[m, n, ρ, o]
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._errors import SpecError
from ._split import resolve_split
from .lora import check_rank, check_scale, lora_scale


@defkind
class GraloraWeight(Adapter):
    """The trained factors of one weight, each a grid of blocks.

        ΔW[(n i), (m o)]  =  alpha / rank · Σ_ρ a[n, i, m, ρ] b[m, n, ρ, o]

    One input axis and one output axis are each split into n blocks. ρ runs over `rank / n`, so that
    all blocks of a row together have the size of rank `rank`. Jung et al. 2025, arXiv:2505.20355.

    Attributes:
        a: `[*shared, n, *in, n, rank / n]`, where the split axis has the size of a block.
        b: `[*shared, n, n, rank / n, *out]`, where the split axis has the size of a block.
        rank: the sum of the ranks of all blocks of a row.
        alpha: the numerator of the scale, or None for a scale of 1.
        blocks: the number of blocks of each side.
        split_axes: the input axis and the output axis that are split.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "gralora"

    a: Any
    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    blocks: int = static(2)
    split_axes: tuple[int, int] = static((0, 1))
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies the delta."""
        return lora_scale(self.rank, self.alpha, "standard")

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        i, o = self.split_axes
        n, i_part = axes.split(i, self.blocks, 0)
        m, o_part = axes.split(o, self.blocks, 1)
        # Inputs [n, i_part], outputs [m, o_part]: block (n, m) of Δ is a[n, :, m] · b[m, n], of
        # rank / n.
        rank = axes.inner(2, self.rank // self.blocks)
        inputs = (i_part if label.id == i else label for label in axes.inputs)
        outputs = (o_part if label.id == o else label for label in axes.outputs)
        factors = {
            "a": (*axes.shared, n, *inputs, m, rank),
            "b": (*axes.shared, m, n, rank, *outputs),
        }
        return Layout(axes.out_with({i: (n, i_part), o: (m, o_part)}), factors)


@dataclasses.dataclass(frozen=True)
class GraloraSpec(AdapterSpec):
    """The spec of GraLoRA for one weight: as many numbers as LoRA, but a delta of higher rank.

    Args:
        rank: the sum of the ranks of all blocks of a row; a multiple of `blocks`.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        blocks: the number of blocks of each side.
        split_axes: the input axis and the output axis that are split; None means the last of each
            side. For a kernel with heads, give the axis of the heads.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import GraloraSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((12, 8))}, {"w": GraloraSpec(4, blocks=2)},
        ...                             jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].b.shape
        ((2, 6, 2, 2), (2, 2, 2, 4))
    """

    rank: int
    alpha: float | None = None
    blocks: int = 2
    split_axes: Sequence[int] | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings, or blocks that do not divide rank and axes."""
        check_rank(path, self, self.rank)
        check_rank(path, self, self.blocks, "number of blocks")
        check_scale(path, self.alpha)
        sizes = {
            f"axis {d} of its shape {tuple(shape)}": shape[d]
            for d in self._split(shape, axes, path)
        }
        for label, size in {"its rank": self.rank, **sizes}.items():
            if size % self.blocks:
                raise SpecError(
                    f"`{path}` has a GraloraSpec with blocks={self.blocks}, which does not divide "
                    f"{label}, {size}. Choose a number of blocks that divides the rank and both "
                    "axes that are split."
                )

    def _split(self, shape: tuple[int, ...], axes: Axes, path: str = "") -> tuple[int, int]:
        return resolve_split(path, self, len(shape), axes, self.split_axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> GraloraWeight:
        """Returns the adapter without arrays."""
        split = self._split(shape, axes)
        roles = (axes.inputs, axes.outputs, axes.shared)
        return GraloraWeight(None, None, self.rank, self.alpha, self.blocks, split, *roles)

    def start(self, start: Start) -> Started:
        """Draws every block of `a` and of `b` separately, with the initializer of its side."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        shapes = weight.layout(shape).shapes()
        fan_in, fan_out = (size // self.blocks for size in start.axes.sizes(shape))
        keys = jax.random.split(start.key)
        shared = [shape[d] for d in start.axes.shared]
        factors = {}
        matrices = {"a": (fan_in, self.rank), "b": (self.rank, fan_out)}
        for (name, matrix), init, key in zip(
            matrices.items(), start.initializers, keys, strict=True
        ):
            # One matrix [in / n, rank] of `a` for each block of inputs, and [rank, out / n] of `b`
            # for each block of outputs; the rank is then split for the blocks of the other side.
            count = math.prod(shared) * self.blocks
            draw = lambda key: init(key, matrix, start.dtype)  # noqa: B023, E731
            drawn = jax.vmap(draw)(jax.random.split(key, count))
            factors[name] = drawn.reshape(shapes[name])
        return Started(weight.with_factors(factors))

"""MiSS: a few trained rows that every block of the inputs shares.

ΔW[shared, i, out]  =  d[i mod rank, out]
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._errors import SpecError
from .._terms import Term
from .lora import check_rank


@defkind
class MissWeight(Adapter):
    """The trained rows of one weight.

        ΔW[i, out]  =  d[i mod rank, out]

    Inputs with equal remainders are summed, and the sums are multiplied by `d`: one product instead
    of the two of LoRA. `i` counts along the last input axis; the delta is constant along the
    others. Kang and Yin 2024, arXiv:2409.15371.

    Attributes:
        d: `[*shared, rank, *out]`.
        rank: the number of rows.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own rows for each entry.
    """

    kind = "miss"

    d: Any
    rank: int = static()
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the rows for a weight of `shape`.

        If the rank divides the input axis, the axis is a label of blocks, which no factor owns, and
        one of rows. Otherwise, the rows are an inner label.
        """
        axes = Labeled.of(self.axes, shape)
        last = axes.inputs[-1]
        # d [rank, out], repeated along the inputs: input i meets row i mod rank.
        if last.size % self.rank:
            rows, out = axes.inner(0, self.rank), axes.out
        else:
            # [several, rows] with d [rows, out]: no factor owns `several`, so d repeats per block.
            several, rows = axes.split(last.id, last.size // self.rank, 0)
            out = axes.out_with({last.id: (several, rows)})
        return Layout(out, {"d": (*axes.shared, rows, *axes.outputs)})

    def neutral(self) -> dict[str, Neutral]:
        """Returns zeros, whether or not the rank divides the axis."""
        return {"d": 0.0}

    def term(self, shape: tuple[int, ...], frozen: Mapping[str, Any], source: Hashable) -> Term:
        """Returns the rows; with a remainder, also a one-hot factor that maps inputs to rows."""
        term = super().term(shape, frozen, source)
        axes = Labeled.of(self.axes, shape)
        last, rows = axes.inputs[-1], axes.inner(0, self.rank)
        if last.size % self.rank == 0:
            return term
        # [in, rank], one where the input meets the row
        meets = jnp.arange(last.size)[:, None] % self.rank == jnp.arange(self.rank)[None]
        return term.times(meets.astype(self.d.dtype), (last, rows))


@dataclasses.dataclass(frozen=True)
class MissSpec(AdapterSpec):
    """The spec of MiSS for one weight: a single factor, which is initially zero.

    It is cheapest if the rank divides the last input axis.

    Args:
        rank: the number of rows.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import MissSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((6, 4))}, {"w": MissSpec(2)},
        ...                             jax.random.key(0))
        >>> tunable["w"].d.shape
        (2, 4)
    """

    rank: int
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an invalid rank, or more rows than inputs."""
        check_rank(path, self, self.rank)
        last = axes.inputs[-1]
        if self.rank > shape[last]:
            raise SpecError(
                f"`{path}` has a MissSpec of rank {self.rank}, but its last input axis {last} has "
                f"size {shape[last]}. Choose a rank up to this size, if possible one that divides "
                "it."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> MissWeight:
        """Returns the adapter without arrays."""
        return MissWeight(None, self.rank, axes.inputs, axes.outputs, axes.shared)

    def start(self, start: Start) -> Started:
        """Draws the rows with the initializer of the fan-out factor: zeros by default."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        _, fan_out = start.axes.sizes(shape)
        shapes = weight.layout(shape).shapes()
        d = start.draw(start.key, start.initializers[1], (self.rank, fan_out), shapes["d"])
        return Started(weight.with_factors({"d": d}))

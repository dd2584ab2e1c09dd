"""BD-LoRA: LoRA with one block-diagonal factor, for serving on several devices.

ΔW[shared, (n i), out]  =  scale · Σ_ρ a[n, i, ρ] b[n, ρ, out],      or blocks of the outputs
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes, normalize
from .._errors import SpecError
from .lora import Scaling, check_rank, check_scale, lora_scale

Side = Literal["in", "out"]


@defkind
class BdloraWeight(Adapter):
    """The trained factors of one weight.

        ΔW[(n i), o]  =  scale · Σ_ρ a[n, i, ρ] b[n, ρ, o]         if `side` is "in"
        ΔW[i, (n o)]  =  scale · Σ_ρ a[i, n, ρ] b[n, ρ, o]         if it is "out"

    One axis is split into n blocks, and so is the rank: ρ runs over `rank / n`. Wang et al. 2025,
    arXiv:2510.23346; the same as PEFT's `BdLoraConfig`.

    Attributes:
        a: `[*shared, n, *in, rank / n]`, or `[*shared, *in, n, rank / n]` for blocks of outputs.
        b: `[*shared, n, rank / n, *out]`. The split axis has the size of a block.
        rank: the sum of the ranks of all blocks.
        alpha: the numerator of the scale, or None for a scale of 1.
        scaling: "standard" or "rslora".
        blocks: the number of blocks of the axis.
        side: "in" if `a` is block-diagonal, "out" if `b` is.
        split_axis: the axis that is split.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "bdlora"

    a: Any
    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    scaling: Scaling = static("standard")
    blocks: int = static(2)
    side: Side = static("in")
    split_axis: int = static(0)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies the delta."""
        return lora_scale(self.rank, self.alpha, self.scaling)

    def check_settings(self, path: str) -> None:
        """Raises `SpecError` for invalid settings."""
        check_rank(path, self, self.rank)
        check_rank(path, self, self.blocks, "number of blocks")
        check_scale(path, self.alpha, self.scaling)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        # The axis that is split is [n, part], and the rank is [n, rank / n].
        n, part = axes.split(self.split_axis, self.blocks, 0)
        rank = axes.inner(1, self.rank // self.blocks)
        inputs = tuple(part if label.id == self.split_axis else label for label in axes.inputs)
        outputs = tuple(part if label.id == self.split_axis else label for label in axes.outputs)
        # Side "in": a [n, part, rank / n] is block-diagonal, and b [n, rank / n, out] is full. Side
        # "out": the reverse. Devices that hold one block each do not communicate between a and b.
        a = (n, *inputs) if self.side == "in" else (*inputs, n)
        factors = {
            "a": (*axes.shared, *a, rank),
            "b": (*axes.shared, n, rank, *outputs),
        }
        return Layout(axes.out_with({self.split_axis: (n, part)}), factors)


@dataclasses.dataclass(frozen=True)
class BdloraSpec(AdapterSpec):
    """The spec of BD-LoRA for one weight: LoRA with a block-diagonal factor.

    It is made for servers that split a weight over several devices, with one block per device. Use
    side="out" for weights that are split along their outputs, such as queries and the first product
    of an MLP, and side="in" for weights that are split along their inputs.

    Args:
        rank: the sum of the ranks of all blocks; a multiple of `blocks`.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        scaling: as in `LoraSpec`.
        blocks: the number of blocks of the axis.
        side: "in" to make `a` block-diagonal, "out" to make `b` block-diagonal.
        split_axis: the axis of that side to split; None means its last axis.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import BdloraSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((12, 8))}, {"w": BdloraSpec(4, blocks=2)},
        ...                             jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].b.shape
        ((2, 6, 2), (2, 2, 8))
    """

    rank: int
    alpha: float | None = None
    scaling: Scaling = "standard"
    blocks: int = 2
    side: Side = "in"
    split_axis: int | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings, or blocks that do not divide rank and axis."""
        check_rank(path, self, self.rank)
        check_rank(path, self, self.blocks, "number of blocks")
        check_scale(path, self.alpha, self.scaling)
        if self.side not in ("in", "out"):
            raise SpecError(
                f"`{path}` has a BdloraSpec of side {self.side!r}; it must be 'in' or 'out'."
            )
        side = axes.inputs if self.side == "in" else axes.outputs
        axis = self._split_axis(path, len(shape), axes)
        if axis not in side:
            raise SpecError(
                f"`{path}` has a BdloraSpec with split_axis={self.split_axis}, but the axes of "
                f"side {self.side!r} are {side}."
            )
        for label, size in {"its rank": self.rank, f"its axis {axis}": shape[axis]}.items():
            if size % self.blocks != 0:
                raise SpecError(
                    f"`{path}` has a BdloraSpec with blocks={self.blocks}, which does not divide "
                    f"{label}, {size}. Choose a number of blocks that divides the rank and the "
                    "axis that is split."
                )

    def _split_axis(self, path: str, ndim: int, axes: Axes) -> int:
        if self.split_axis is None:
            return (axes.inputs if self.side == "in" else axes.outputs)[-1]
        return normalize(path, ndim, "split_axis", (self.split_axis,))[0]

    def blank(self, shape: tuple[int, ...], axes: Axes) -> BdloraWeight:
        """Returns the adapter without arrays."""
        return BdloraWeight(
            None, None, self.rank, self.alpha, self.scaling, self.blocks, self.side,
            self._split_axis("", len(shape), axes), axes.inputs, axes.outputs, axes.shared,
        )  # fmt: skip

    def start(self, start: Start) -> Started:
        """Draws the factors, each block of the block-diagonal one separately.

        `b` is zero by default. PEFT draws the blocks of `a` from a range that is wider by √6.
        """
        weight = self.blank(start.base.shape, start.axes)
        shapes = weight.layout(start.base.shape).shapes()
        fan_in, fan_out = start.axes.sizes(start.base.shape)
        # The rank of each block.
        part = self.rank // self.blocks
        matrices = {"a": (fan_in, self.rank), "b": (self.rank, fan_out)}
        cut = "a" if self.side == "in" else "b"
        matrices[cut] = (
            (fan_in // self.blocks, part) if cut == "a" else (part, fan_out // self.blocks)
        )
        shared = math.prod(start.base.shape[d] for d in start.axes.shared)
        keys = jax.random.split(start.key)
        factors = {}
        for (name, matrix), init, key in zip(
            matrices.items(), start.initializers, keys, strict=True
        ):
            # A block-diagonal factor consists of one small matrix per block.
            count = shared * (self.blocks if name == cut else 1)
            draw = lambda key: init(key, matrix, start.dtype)  # noqa: B023, E731
            # [count, *matrix] -> the factor's axes
            drawn = jax.vmap(draw)(jax.random.split(key, count))
            factors[name] = drawn.reshape(shapes[name])
        return Started(weight.with_factors(factors))

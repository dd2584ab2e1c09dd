"""LoCon with a Tucker core: LoRA over the channels, with a core over the window in between.

ΔW[shared, *window, in, out]  =  scale · Σ_rq a[in, r] core[*window, r, q] b[q, out]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from ._tucker import channel_axis_of, draw_core
from .lora import check_rank, check_scale, lora_scale


@defkind
class LoconWeight(Adapter):
    """The three trained factors of one weight.

        ΔW[*window, in, out]  =  alpha / rank · Σ_rq a[in, r] core[*window, r, q] b[q, out]

    In a convolution, this is a 1×1 convolution, one over the window from `rank` to `rank` channels,
    and another 1×1 convolution. Yeh et al. 2024 (LyCORIS), arXiv:2309.14859.

    Attributes:
        a: `[*shared, channels, rank]`.
        core: `[*shared, *window, rank, rank]`.
        b: `[*shared, rank, *out]`.
        rank: the inner size on both sides of the core.
        alpha: the numerator of the scale, or None for a scale of 1.
        channel_axis: the input axis of the channels; the other input axes are the window.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "locon"

    a: Any
    core: Any
    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    channel_axis: int = static(0)
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
        # a [channels, left] · core [*window, left, right] · b [right, *out] -> [*window, channels,
        # *out]
        channels = tuple(label for label in axes.inputs if label.id == self.channel_axis)
        window = tuple(label for label in axes.inputs if label.id != self.channel_axis)
        left, right = axes.inner(0, self.rank), axes.inner(1, self.rank)
        factors = {
            "a": (*axes.shared, *channels, left),
            "core": (*axes.shared, *window, left, right),
            "b": (*axes.shared, right, *axes.outputs),
        }
        return Layout(axes.out, factors)


@dataclasses.dataclass(frozen=True)
class LoconSpec(AdapterSpec):
    """The spec of LoCon for one weight: far fewer numbers than LoRA if the window is large.

    A weight without a window has a core of `rank × rank`.

    Args:
        rank: the inner size on both sides of the core.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        channel_axis: the input axis of the channels; None means the last input axis.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoconSpec, init_lora
        >>> kernel = jnp.ones((3, 3, 16, 32))  # [height, width, in, out]
        >>> frozen, tunable = init_lora({"w": kernel}, {"w": LoconSpec(4)}, jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].core.shape, tunable["w"].b.shape
        ((16, 4), (3, 3, 4, 4), (4, 32))
    """

    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    channel_axis: int | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings, or channels that are not an input."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)
        channel_axis_of(path, self, len(shape), axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LoconWeight:
        """Returns the adapter without arrays."""
        channel = channel_axis_of("", self, len(shape), axes)
        roles = (axes.inputs, axes.outputs, axes.shared)
        return LoconWeight(None, None, None, self.rank, self.alpha, channel, *roles)

    def start(self, start: Start) -> Started:
        """Draws `a` and the core with the fan-in initializer, and `b` with the other."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        shapes = weight.layout(shape).shapes()
        _, fan_out = start.axes.sizes(shape)
        channels = shape[weight.channel_axis]
        random, zero = start.initializers
        keys = jax.random.split(start.key, 3)
        factors = {
            "a": start.draw(keys[0], random, (channels, self.rank), shapes["a"]),
            "core": draw_core(start, keys[1], random, shapes["core"]),
            "b": start.draw(keys[2], zero, (self.rank, fan_out), shapes["b"]),
        }
        return Started(weight.with_factors(factors))

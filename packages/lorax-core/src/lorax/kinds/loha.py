"""LoHa: the entrywise product of two low-rank matrices.

ΔW[shared, in, out]  =  scale · (Σ_r a1[in, r] b1[r, out]) · (Σ_q a2[in, q] b2[q, out])

In Tucker form, each of the two has a core over the window of a convolution.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from ._tucker import channels_of_core, check_tucker, draw_core, draw_outputs
from .lora import check_rank, check_scale, lora_scale

NAMES = ("a1", "b1", "a2", "b2", "core1", "core2")


@defkind
class LohaWeight(Adapter):
    """The four trained factors of one weight, or six in Tucker form.

        ΔW                     =  alpha / rank · (a1 b1) ⊙ (a2 b2)
        ΔW[*window, in, out]   =  alpha / rank · (a1 core1[*window] b1) ⊙ (a2 core2[*window] b2)

    Its rank is up to `rank²`. Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098.

    Attributes:
        a1: `[*shared, *in, rank]`, or `[*shared, channels, rank]` with a core.
        b1: `[*shared, rank, *out]`.
        a2: as `a1`.
        b2: as `b1`.
        core1: `[*shared, *window, rank, rank]`, or None.
        core2: as `core1`.
        rank: the inner size of both products.
        alpha: the numerator of the scale, or None for a scale of 1.
        channel_axis: the input axis of the channels in Tucker form, otherwise None.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "loha"

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    core1: Any
    core2: Any
    rank: int = static()
    alpha: float | None = static(None)
    channel_axis: int | None = static(None)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies the delta."""
        return lora_scale(self.rank, self.alpha, "standard")

    def factors(self) -> dict[str, Any]:
        """Returns the factors that the form has."""
        names = NAMES[:4] if self.channel_axis is None else NAMES
        return {name: getattr(self, name) for name in names}

    def with_factors(self, factors: Mapping[str, Any]) -> Self:
        """Returns the same adapter with other arrays."""
        return super().with_factors({**dict.fromkeys(NAMES), **factors})

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        channels, window = axes.inputs, ()
        if self.channel_axis is not None:
            channels = tuple(label for label in axes.inputs if label.id == self.channel_axis)
            window = tuple(label for label in axes.inputs if label.id != self.channel_axis)
        factors = {}
        # Δ = (a1 b1) ⊙ (a2 b2): both have the labels of the weight, and each a rank label of its
        # own.
        for k in range(2):
            left = right = axes.inner(k, self.rank)
            if self.channel_axis is not None:
                right = axes.inner(2 + k, self.rank)
                # a [channels, left] · core [*window, left, right] · b [right, *out]
                factors[f"core{k + 1}"] = (*axes.shared, *window, left, right)
            factors[f"a{k + 1}"] = (*axes.shared, *channels, left)
            factors[f"b{k + 1}"] = (*axes.shared, right, *axes.outputs)
        return Layout(axes.out, {name: factors[name] for name in NAMES if name in factors})


@dataclasses.dataclass(frozen=True)
class LohaSpec(AdapterSpec):
    """The spec of LoHa for one weight: a delta of rank up to `rank²`, with twice LoRA's numbers.

    As in PEFT, `a2` is initially zero: it is drawn by `b_init` of `init_lora`, the others by
    `a_init`.

    Args:
        rank: the inner size of both products.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        tucker: whether the window of a convolution is in cores of `rank × rank`, as with
            `use_effective_conv2d` in PEFT and `use_tucker` in LyCORIS. A weight without a window
            has no core.
        channel_axis: the input axis of the channels with a core; None means the last input axis.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LohaSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": LohaSpec(2)},
        ...                             jax.random.key(0))
        >>> tunable["w"].a1.shape, tunable["w"].b2.shape
        ((5, 2), (2, 3))
    """

    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    tucker: bool = False
    channel_axis: int | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)
        check_tucker(path, self, shape, axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LohaWeight:
        """Returns the adapter without arrays."""
        none, roles = [None] * len(NAMES), (axes.inputs, axes.outputs, axes.shared)
        channels = channels_of_core(self, shape, axes)
        return LohaWeight(*none, self.rank, self.alpha, channels, *roles)

    def start(self, start: Start) -> Started:
        """Draws random factors, with `a2` zero by default."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        fan_in, fan_out = start.axes.sizes(shape)
        if weight.channel_axis is not None:
            fan_in = shape[weight.channel_axis]
        random, zero = start.initializers
        # A single zero factor makes Δ zero, and still gets a gradient through the others.
        shapes = weight.layout(shape).shapes()
        factors = {}
        for (name, sizes), key in zip(
            shapes.items(), jax.random.split(start.key, len(shapes)), strict=True
        ):
            if name.startswith("core"):
                factors[name] = draw_core(start, key, random, sizes)
            elif name.startswith("b") and weight.channel_axis is not None:
                factors[name] = draw_outputs(start, key, random, sizes)
            else:
                init = zero if name == "a2" else random
                matrix = (fan_in, self.rank) if name[0] == "a" else (self.rank, fan_out)
                factors[name] = start.draw(key, init, matrix, sizes)
        return Started(weight.with_factors(factors))

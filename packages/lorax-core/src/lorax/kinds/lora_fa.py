"""LoRA-FA: LoRA with a frozen fan-in factor.

delta[shared, in, out]  =  scale · Σ_r a[shared, in, r] · b[shared, r, out]

Only `b` is trained, so the backward pass needs only `x · a`, which is a rank wide, instead of `x`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .lora import (
    Scaling,
    check_rank,
    check_scale,
    draw_two,
    lora_scale,
    two_factors,
    warn_of_high_rank,
)


@defkind
class LoraFAWeight(Adapter):
    """The trained fan-out factor of one weight.

    The delta is that of LoRA, `scale · a @ b` for a kernel `[in, out]`. Besides the base, the
    frozen tree holds `a`, `[*shared, *in, rank]`. Zhang et al. 2023, arXiv:2308.03303.

    Attributes:
        b: `[*shared, rank, *out]`, the fan-out factor.
        rank: the inner size.
        alpha: the numerator of the scale, or None for a scale of 1.
        scaling: "standard" or "rslora".
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "lora_fa"

    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    scaling: Scaling = static("standard")
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies `a @ b`."""
        return lora_scale(self.rank, self.alpha, self.scaling)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
        # b [*shared, rank, *out] is trained, a [*shared, *in, rank] is frozen.
        return Layout(axes.out, {"b": b}, {"a": a})


@dataclasses.dataclass(frozen=True)
class LoraFASpec(AdapterSpec):
    """The spec of LoRA-FA for one weight: only `b` is trained, so fewer activations are saved.

        delta = scale · a @ b

    Args:
        rank: as in `LoraSpec`.
        alpha: as in `LoraSpec`.
        scaling: as in `LoraSpec`.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraFASpec, init_lora
        >>> params = {"w": jnp.ones((5, 3))}
        >>> frozen, tunable = init_lora(params, {"w": LoraFASpec(2)}, jax.random.key(0))
        >>> frozen["w"].factors["a"].shape, tunable["w"].b.shape
        ((5, 2), (2, 3))
    """

    has_narrow_delta = True
    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    scaling: Scaling = "standard"
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an invalid rank or alpha; warns of a rank that is too high."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha, self.scaling)
        warn_of_high_rank(path, self.rank, shape, axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LoraFAWeight:
        """Returns the adapter without arrays."""
        return LoraFAWeight(
            None, self.rank, self.alpha, self.scaling, axes.inputs, axes.outputs, axes.shared
        )

    def start(self, start: Start) -> Started:
        """Returns the factors of LoRA; `a` goes to the frozen tree."""
        a, b = draw_two(start, self.rank, *start.initializers)
        weight = self.blank(start.base.shape, start.axes)
        return Started(weight.with_factors({"b": b}), {"a": a})
